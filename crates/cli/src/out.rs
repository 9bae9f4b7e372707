//! Standard output and standard error, and the files that a command writes. A reader that closes its pipe (`… | head -1`) ends
//! the output and not the command. Any other failure to write fails the command.

use std::{
    fmt,
    fs::{File, OpenOptions},
    io::{self, IsTerminal as _, Write},
    path::Path,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use tracing_subscriber::fmt::MakeWriter;

use crate::report::Failure;

/// The first failure to write standard output.
static FAILED: OnceLock<io::Error> = OnceLock::new();
/// The cursor is at the end of a line that [`live`] wrote.
static LIVE: AtomicBool = AtomicBool::new(false);

/// Goes to the start of the line, and clears it.
const CLEAR: &str = "\r\x1b[K";

/// Prints a line on standard output.
macro_rules! say {
    ($($arg:tt)*) => { $crate::out::line(format_args!($($arg)*)) };
}
pub(crate) use say;

pub(crate) fn line(text: fmt::Arguments<'_>) {
    write(format_args!("{text}\n"));
}

fn write(text: fmt::Arguments<'_>) {
    let mut out = io::stdout().lock();
    if let Err(e) = out.write_fmt(text).and_then(|()| out.flush())
        && e.kind() != io::ErrorKind::BrokenPipe
    {
        let _ = FAILED.set(e);
    }
}

/// Fails if standard output could not be written, for another reason than a closed pipe.
pub(crate) fn check() -> Result<(), Failure> {
    match FAILED.get() {
        Some(e) => Err(Failure::failed(format!("cannot write to standard output: {e}; send it elsewhere"))),
        None => Ok(()),
    }
}

/// Whether standard output is a terminal, on which a line can be shown again and again.
pub(crate) fn is_live() -> bool {
    io::stdout().is_terminal()
}

/// Shows this text in place of the one before. The text is cut to the width of the terminal.
pub(crate) fn live(text: &str) {
    let width = rustix::termios::tcgetwinsize(io::stdout()).map_or(80, |w| usize::from(w.ws_col)).max(20);
    let text: String = text.chars().take(width - 1).collect();
    LIVE.store(true, Ordering::Relaxed);
    write(format_args!("{CLEAR}{text}"));
}

/// Ends the line that [`live`] shows.
pub(crate) fn end_live() {
    if LIVE.swap(false, Ordering::Relaxed) {
        write(format_args!("\n"));
    }
}

/// Prints a line on standard error. There is no place to report a failure to.
pub(crate) fn error(text: fmt::Arguments<'_>) {
    let _ = writeln!(Log.make_writer(), "{text}");
}

/// The log on standard error. A log line takes the place of the line that [`live`] shows, until that is shown again.
pub(crate) struct Log;

impl<'a> MakeWriter<'a> for Log {
    type Writer = io::Stderr;

    fn make_writer(&'a self) -> io::Stderr {
        let mut err = io::stderr();
        if LIVE.load(Ordering::Relaxed) && err.is_terminal() {
            let _ = err.write_all(CLEAR.as_bytes());
        }
        err
    }
}

fn cannot_write(path: &Path) -> impl FnOnce(io::Error) -> Failure {
    move |e| Failure::failed(format!("cannot write {}: {e}; the folder must exist and be writable", path.display()))
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(false).open(path)
}

/// Checks, before a command does its work, that it can write a file. Changes no file, and leaves none behind.
pub(crate) fn check_file(path: &Path) -> Result<(), Failure> {
    let before = std::fs::metadata(path);
    // Opening a pipe may wait for its reader.
    if before.as_ref().is_ok_and(|m| !m.is_file() && !m.is_dir()) {
        return Ok(());
    }
    open(path).map_err(cannot_write(path))?;
    if before.is_err() {
        std::fs::remove_file(path).map_err(cannot_write(path))?;
    }
    Ok(())
}

/// Writes a file in place and at once. A process that is killed leaves the text before or this one.
pub(crate) fn write_file(path: &Path, text: &str) -> Result<(), Failure> {
    let write = || {
        let mut file = open(path)?;
        let old = file.metadata()?;
        if old.is_file() && old.len() > text.len() as u64 {
            file.set_len(text.len() as u64)?;
        }
        file.write_all(text.as_bytes())
    };
    write().map_err(cannot_write(path))
}
