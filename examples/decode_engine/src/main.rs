//! `decode-engine`: see the library's first page.

use std::{io::IsTerminal as _, process::ExitCode};

use clap::Parser;
use decode_engine::{demo, router, serve, soak, ttft};
use tracing_subscriber::EnvFilter;

/// A small, real engine around kvferry: prefill and decode processes, a router, and a bad day.
#[derive(Parser)]
#[command(version)]
enum Args {
    /// One engine process, with an OpenAI-style HTTP front.
    Serve(serve::Args),
    /// Sends prompts to a prefill engine, then to a decode engine.
    Router(router::Args),
    /// A good day and a bad one on this machine, next to a single engine.
    Demo(demo::Args),
    /// Requests at a steady rate, a prefill engine killed again and again, and not one wrong answer.
    Soak(soak::Args),
    /// Time to first token with remote and with local prefill, and after a kill.
    Ttft(ttft::Args),
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("error"));
    // Colours are for people: a file or a pipe gets plain text.
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
