//! The `kvferry` command: serves and pulls a pattern, measures, checks a machine, and demonstrates a bad day.

mod args;
mod bare;
mod bench;
mod demo;
mod doctor;
mod offers;
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

use clap::Parser as _;

use crate::report::FailureRecord;

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

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) if e.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            eprintln!("error: a command is missing: serve, pull, bench, doctor or demo; see `kvferry --help`");
            return ExitCode::from(2);
        }
        Err(e) if e.use_stderr() => {
            // One line with the error and a pointer to the help.
            let text = e.render().to_string();
            let mut lines = text.lines().map(str::trim).filter(|l| !l.is_empty());
            let first = lines.next().unwrap_or("error: wrong usage");
            let rest: Vec<_> = lines.take_while(|l| !l.starts_with("Usage:") && !l.starts_with("For more")).collect();
            let more = if rest.is_empty() { String::new() } else { format!(" ({})", rest.join("; ")) };
            eprintln!("{first}{more}; see `kvferry --help`");
            return ExitCode::from(2);
        }
        Err(e) => {
            // Help or version.
            let _ = e.print();
            return ExitCode::SUCCESS;
        }
    };
    // The demo causes failures on purpose, and reports them itself.
    let default = if matches!(cli.command, Command::Demo(_)) { "error" } else { "warn" };
    let filter = tracing_subscriber::EnvFilter::try_from_env("KVFERRY_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    // A file or a pipe gets plain text.
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours).init();
    // A failed `pull` writes its own record.
    let json = match &cli.command {
        Command::Serve(args) => Some(args.json.clone()),
        Command::Demo(args) => Some(args.json.clone()),
        Command::Bench(args) => Some(args.json.clone()),
        Command::Doctor(args) => Some(args.json.clone()),
        Command::Pull(_) | Command::RawSend { .. } => None,
    };
    let done = match cli.command {
        Command::Serve(args) => serve::run(args),
        Command::Pull(args) => pull::run(args),
        Command::Demo(args) => demo::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::RawSend { port } => raw::send(port),
    };
    match done {
        Ok(code) => code,
        Err(failure) => {
            let written = json.map_or(Ok(()), |json| json.write(&FailureRecord::from(&failure)));
            for f in [Some(&failure), written.as_ref().err()].into_iter().flatten() {
                eprintln!("error: {}", f.message);
            }
            ExitCode::from(failure.code)
        }
    }
}
