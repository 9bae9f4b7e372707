//! The error of a start. Each message says the cause and the next step.

use kvferry_proto::BadLayout;

use crate::memory::GpuError;

/// A producer or consumer that could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The control plane's address cannot be listened on.
    #[error("cannot listen on {addr}: {source}; choose another port, or stop what holds it")]
    Listen {
        /// The address.
        addr: String,
        /// The system's error.
        source: std::io::Error,
    },
    /// The memory could not be allocated.
    #[error("cannot allocate a pool of {bytes} bytes: {source}; ask for fewer blocks or regions")]
    Memory {
        /// Bytes asked for.
        bytes: u64,
        /// The system's error.
        source: std::io::Error,
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
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// The system's error.
        source: std::io::Error,
    },
}

impl StartError {
    pub(crate) fn os(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
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
