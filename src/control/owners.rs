//! Certificates of the control plane: both ends prove their identity under one authority.

use std::{error::Error, time::Duration};

use tonic::transport::{Certificate, ClientTlsConfig, Identity, ServerTlsConfig};

use crate::{config::TlsConfig, error::StartError};

/// A producer's settings: its own certificate, and only clients of the authority.
pub(crate) fn server(tls: &TlsConfig, handshake: Duration) -> Result<ServerTlsConfig, StartError> {
    check(tls)?;
    Ok(ServerTlsConfig::new()
        .identity(Identity::from_pem(&tls.certificate, &tls.key))
        .client_ca_root(Certificate::from_pem(&tls.ca))
        .client_auth_optional(false)
        .timeout(handshake))
}

/// A consumer's settings: its own certificate, and only producers of the authority.
pub(crate) fn client(tls: &TlsConfig, handshake: Duration) -> Result<ClientTlsConfig, StartError> {
    check(tls)?;
    Ok(ClientTlsConfig::new()
        .identity(Identity::from_pem(&tls.certificate, &tls.key))
        .ca_certificate(Certificate::from_pem(&tls.ca))
        .domain_name(&tls.server_name)
        .timeout(handshake))
}

/// Checks the PEM files. The TLS library takes an empty file for an empty list, and reports that late or never.
fn check(tls: &TlsConfig) -> Result<(), StartError> {
    let has = |pem: &[u8], label: &str| pem.windows(label.len()).any(|w| w == label.as_bytes());
    let bad = |what: &str| Err(StartError::Tls(what.into()));
    if !has(&tls.certificate, "-----BEGIN CERTIFICATE-----") {
        return bad("the certificate is not PEM: it has no BEGIN CERTIFICATE");
    }
    if !has(&tls.ca, "-----BEGIN CERTIFICATE-----") {
        return bad("the authority's certificate is not PEM: it has no BEGIN CERTIFICATE");
    }
    if !has(&tls.key, "PRIVATE KEY-----") {
        return bad("the key is not PEM: it has no BEGIN PRIVATE KEY");
    }
    if tls.server_name.is_empty() {
        return bad("server_name is empty: give the name that producers' certificates carry");
    }
    Ok(())
}

/// An error with its sources on one line: the outermost text alone is "transport error".
pub(crate) fn why(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut inner = error.source();
    while let Some(e) = inner {
        let said = e.to_string();
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        inner = e.source();
    }
    text
}
