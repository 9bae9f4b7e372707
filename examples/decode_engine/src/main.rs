//! The command `decode-engine`.

use std::{io::IsTerminal as _, process::ExitCode};

use clap::Parser;
use decode_engine::{demo, router, serve, soak, ttft};
use tracing_subscriber::EnvFilter;

/// A small, real engine around kvferry: prefill and decode processes, a router, and a bad day.
#[derive(Parser)]
#[command(version)]
enum Args {
    /// Run one engine with an OpenAI-style HTTP front.
    Serve(serve::Args),
    /// Send prompts to a prefill engine, then to a decode engine.
    Router(router::Args),
    /// Show a good day and a bad day on this machine, and compare the answers with those of a single engine.
    Demo(demo::Args),
    /// Send requests at a steady rate while prefill engines are killed, and check every answer.
    Soak(soak::Args),
    /// Measure the time to first token with remote prefill, with local prefill, and after a kill.
    Ttft(ttft::Args),
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("error"));
    // A file or a pipe gets plain text.
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours).init();
    let done = match Args::parse() {
        Args::Serve(a) => serve::run(a).await.map(|()| true),
        Args::Router(a) => router::run(a).await.map(|()| true),
        Args::Demo(a) => demo::run(a).await,
        Args::Soak(a) => soak::run(a).await,
        Args::Ttft(a) => ttft::run(a).await,
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("decode-engine: {e:#}");
            ExitCode::FAILURE
        }
    }
}
