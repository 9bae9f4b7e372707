//! The `kvferry` command: serves and pulls a pattern, measures, checks a machine, and demonstrates a bad day.

mod args;
mod bare;
mod bench;
mod demo;
mod doctor;
mod offers;
mod out;
mod peer;
mod perftest;
mod plot;
mod pool;
mod pull;
mod raw;
mod report;
mod row;
mod serve;

use std::{io::IsTerminal as _, process::ExitCode};

use clap::{CommandFactory as _, Parser as _};

use crate::{
    args::JsonArg,
    out::say,
    report::{Failure, FailureRecord},
};

/// Moves KV-cache blocks between LLM serving engines and reports, block by block, which ones arrived.
#[derive(clap::Parser)]
#[command(name = "kvferry", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Serve a pool of blocks that holds a pattern.
    Serve(serve::Args),
    /// Pull blocks from a `kvferry serve` once, and check every loaded byte.
    ///
    /// Exit code: 0 if all blocks were loaded, 3 if some are invalid, 1 if the pull was refused or failed, 2 for wrong
    /// usage.
    Pull(pull::Args),
    /// Show a good day and a bad day with processes on this machine. The exit code is 0 only if every promise was kept.
    Demo(demo::Args),
    /// Measure pulls of scattered blocks, for several block sizes.
    Bench(bench::Args),
    /// Check this machine: each check reports OK, WARN or FAIL, and a remedy.
    Doctor(doctor::Args),
    /// The sender of `bench --vs-raw` over TCP.
    #[command(hide = true)]
    RawSend {
        /// Port of 127.0.0.1 to connect to.
        port: u16,
    },
}

/// Descriptors that every command but `doctor` needs: a pull and its producer hold 30 each.
const LEAST_FILES: u64 = 64;

fn main() -> ExitCode {
    let command = std::env::args().nth(1).filter(|name| Cli::command().find_subcommand(name).is_some());
    report::set_command(command.as_deref());
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) if e.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let missing = "a command is missing: serve, pull, bench, doctor or demo";
            return failed(&Failure::usage(missing), None);
        }
        Err(e) if e.use_stderr() => {
            // One line with the error and a pointer to the help.
            let text = e.render().to_string();
            let mut lines = text.lines().map(str::trim).filter(|l| !l.is_empty());
            let first = lines.next().unwrap_or("wrong usage");
            let rest: Vec<_> = lines.take_while(|l| !l.starts_with("Usage:") && !l.starts_with("For more")).collect();
            let more = if rest.is_empty() { String::new() } else { format!(" ({})", rest.join("; ")) };
            let first = first.strip_prefix("error: ").unwrap_or(first);
            return failed(&Failure::usage(format!("{first}{more}")), None);
        }
        Err(e) => {
            // Help or version.
            say!("{}", e.render().to_string().trim_end());
            return out::check().map_or_else(|f| failed(&f, None), |()| ExitCode::SUCCESS);
        }
    };
    // The demo causes failures on purpose, and reports them itself.
    let default = if matches!(cli.command, Command::Demo(_)) { "error" } else { "warn" };
    let filter = tracing_subscriber::EnvFilter::try_from_env("KVFERRY_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    // A file or a pipe gets plain text.
    let colours = std::io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(out::Log).with_ansi(colours);
    // Otherwise it panics if standard error is closed.
    log.log_internal_errors(false).init();
    let json = match &cli.command {
        Command::Serve(args) => Some(args.json.clone()),
        Command::Demo(args) => Some(args.json.clone()),
        Command::Bench(args) => Some(args.json.clone()),
        Command::Doctor(args) => Some(args.json.clone()),
        Command::Pull(args) => Some(args.json.clone()),
        Command::RawSend { .. } => None,
    };
    let ready = json.as_ref().map_or(Ok(()), JsonArg::check).and_then(|()| check_files(&cli.command));
    // They write a record of their own, however they end.
    let own = matches!(cli.command, Command::Pull(_) | Command::Bench(_));
    let done = match cli.command {
        Command::Pull(args) => pull::run(args, ready),
        Command::Bench(args) => bench::run(args, ready),
        Command::Serve(args) => ready.and_then(|()| serve::run(args)),
        Command::Demo(args) => ready.and_then(|()| demo::run(args)),
        Command::Doctor(args) => ready.and_then(|()| doctor::run(args)),
        Command::RawSend { port } => raw::send(port),
    };
    match done {
        Ok(code) if code == ExitCode::SUCCESS => out::check().map_or_else(|f| failed(&f, None), |()| code),
        Ok(code) => code,
        Err(failure) => failed(&failure, json.filter(|_| !own)),
    }
}

/// Reports a failure in one line on standard error, and as JSON.
fn failed(failure: &Failure, json: Option<JsonArg>) -> ExitCode {
    out::end_live();
    let written = json.map_or(Ok(()), |json| json.write(&FailureRecord::from(failure)));
    let other = written.err().filter(|f| f.message != failure.message);
    for f in [Some(failure), other.as_ref()].into_iter().flatten() {
        out::error(format_args!("error: {}", f.message));
    }
    ExitCode::from(failure.code)
}

/// Refuses a limit of open files at which commands fail in the middle.
fn check_files(command: &Command) -> Result<(), Failure> {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
    if limit >= LEAST_FILES || matches!(command, Command::Doctor(_)) {
        return Ok(());
    }
    Err(Failure::failed(format!(
        "{limit} open files are allowed, and kvferry needs {LEAST_FILES}: use `ulimit -n 1024`"
    )))
}
