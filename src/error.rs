//! The error of a start. Each message says the cause and the next step.

use std::io;

use kvferry_proto::BadLayout;

use crate::memory::GpuError;

/// A producer or consumer that could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The control plane's address cannot be listened on.
    #[error("cannot listen on {addr}: {source}; {}", listen_advice(source))]
    Listen {
        /// The address.
        addr: String,
        /// The system's error.
        source: io::Error,
    },
    /// The memory could not be allocated.
    #[error("cannot allocate a pool of {bytes} bytes: {source}; ask for fewer blocks or regions")]
    Memory {
        /// Bytes asked for.
        bytes: u64,
        /// The system's error.
        source: io::Error,
    },
    /// The layout is not usable.
    #[error(transparent)]
    Layout(#[from] BadLayout),
    /// A setting is out of range.
    #[error("{field}: {why}")]
    Config {
        /// The setting's name.
        field: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// A certificate or key is not usable.
    #[error("tls: {0}")]
    Tls(String),
    /// GPU memory is not usable.
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// A system call failed.
    #[error("{what}: {source}{}", os_advice(source))]
    Os {
        /// What was tried.
        what: &'static str,
        /// The system's error.
        source: io::Error,
    },
}

/// The next step after an address could not be listened on.
fn listen_advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => "choose another port, or stop the process that holds it",
        io::ErrorKind::PermissionDenied => "choose a port from 1024 on, or grant CAP_NET_BIND_SERVICE",
        io::ErrorKind::AddrNotAvailable => {
            "no interface here has this address: choose one that `ip address` lists, and name another one in `advertise`"
        }
        // The resolver's errors have no kind of their own.
        _ if is_file_limit(error) => FILE_LIMIT,
        _ => "write an address or host name of this machine, and a port: HOST:PORT",
    }
}

/// The next step after a system call failed, if there is a general one.
fn os_advice(error: &io::Error) -> String {
    if is_file_limit(error) { format!("; {FILE_LIMIT}") } else { String::new() }
}

const FILE_LIMIT: &str = "raise the limit of open files (`ulimit -n`)";

fn is_file_limit(error: &io::Error) -> bool {
    let limits = [rustix::io::Errno::MFILE, rustix::io::Errno::NFILE];
    limits.iter().any(|e| error.raw_os_error() == Some(e.raw_os_error()))
}

impl StartError {
    pub(crate) fn os(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Os { what, source }
    }
}

/// An error with its sources on one line: the outermost text alone is "transport error".
pub(crate) fn with_sources(error: &(dyn std::error::Error + 'static)) -> String {
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
