use std::{fmt, io};

/// The reason why no wire can be made here: a sentence for a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unavailable(pub(super) String);

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unavailable {}

impl Unavailable {
    /// `EPERM` and `EACCES` name the missing right; other errors keep the kernel's text.
    pub(super) fn new(doing: &str, needs: &str, error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::PermissionDenied => Self(format!("{doing} needs {needs}: {error}")),
            _ => Self(format!("{doing} failed: {error}")),
        }
    }
}
