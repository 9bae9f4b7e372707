//! The `kvferry` command: serve and pull a pattern, measure, look a machine over, and show the bad day.

mod args;
mod bare;
mod bench;
mod child;
mod demo;
mod doctor;
mod offers;
mod peer;
mod perftest;
mod plot;
mod pull;
mod raw;
mod report;
mod row;
mod serve;

use std::{io::IsTerminal as _, process::ExitCode};

use clap::Parser as _;

use crate::report::Failure;

/// Moves KV-cache blocks between LLM serving engines and says, block by block, what arrived.
#[derive(clap::Parser)]
#[command(name = "kvferry", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Hold blocks of a pattern in memory and let others pull them.
    Serve(serve::Args),
    /// Pull blocks from a `kvferry serve` once, and check every loaded byte.
    ///
    /// Exit code: 0 all loaded, 3 some invalid, 1 refused or failed, 2 usage.
    Pull(pull::Args),
    /// Show a good day and a bad one with real processes on this machine. Exit code 0 only if every promise held.
    Demo(demo::Args),
    /// Measure pulls of scattered blocks, size by size.
    Bench(bench::Args),
    /// Look this machine over: every check with OK, WARN or FAIL, and what to do.
    Doctor(doctor::Args),
    /// The other end of `bench --vs-raw`.
    #[command(hide = true)]
    RawSend {
        /// Where to connect to.
        port: u16,
    },
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) if e.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            eprintln!("error: say what to do: serve, pull, bench, doctor or demo; see `kvferry --help`");
            return ExitCode::from(2);
        }
        Err(e) if e.use_stderr() => {
            // One line: what is wrong, and where the flags are listed.
            let text = e.render().to_string();
            let mut lines = text.lines().map(str::trim).filter(|l| !l.is_empty());
            let first = lines.next().unwrap_or("error: wrong usage");
            let rest: Vec<_> = lines.take_while(|l| !l.starts_with("Usage:") && !l.starts_with("For more")).collect();
            let more = if rest.is_empty() { String::new() } else { format!(" ({})", rest.join("; ")) };
            eprintln!("{first}{more}; see `kvferry --help`");
            return ExitCode::from(2);
        }
        Err(e) => {
            // Help or version: what was asked for.
            let _ = e.print();
            return ExitCode::SUCCESS;
        }
    };
    // The demo breaks things on purpose, and says itself what came of it.
    let usual = if matches!(cli.command, Command::Demo(_)) { "error" } else { "warn" };
    let filter = tracing_subscriber::EnvFilter::try_from_env("KVFERRY_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(usual));
    // Colours are for people: a file or a pipe gets plain text.
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours).init();
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
        Err(Failure { code, message }) => {
            eprintln!("error: {message}");
            ExitCode::from(code)
        }
    }
}
