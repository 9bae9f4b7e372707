//! The promises over TLS: this binary runs its own tests again, with certificates for both sides.

use std::process::Command;

use kvferry_testkit::rig::{TLS, TLS_NAME};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};

#[test]
fn every_promise_holds_over_tls() {
    if std::env::var_os(TLS).is_some() {
        return;
    }
    let folder = std::env::temp_dir().join(format!("kvferry-contract-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let mut ca = CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec![TLS_NAME.into()]).unwrap();
    params.subject_alt_names.push(SanType::URI("kvferry://engine/*".try_into().unwrap()));
    let certificate = params.signed_by(&key, &ca).unwrap();
    for (name, pem) in [("certificate", certificate.pem()), ("key", key.serialize_pem()), ("ca", ca.pem())] {
        std::fs::write(folder.join(name), pem).unwrap();
    }
    // Without those that speak the protocol by hand, without TLS.
    let promises = ["exact::", "fresh::", "frugal::", "healing::", "leak_free::", "quiet::", "timely::"];
    let out = Command::new(std::env::current_exe().unwrap()).args(promises).env(TLS, &folder).output().unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{said}\n{}", String::from_utf8_lossy(&out.stderr));
    assert!(!said.contains(" 0 passed"), "{said}");
}
