//! `decode-engine ttft --hand-over`: the time from the last computed chunk of a prompt to the decode engine's first token, one
//! engine after the other compared with both at the same time.
//!
//! The command takes the part of the router, so that it gets the times that both engines report. All are of one clock. Prefill and
//! decode engines have one thread each, and are idle otherwise.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use kvferry::Token;

use crate::{
    api::{Answer, Ask, Identity, Prompt, Times, Transfer},
    client::{Client, Reply},
    fleet::{Fleet, Plan},
    report::Report,
};

/// Tokens of an answer: the time between two of them is a decode step.
const ANSWER: usize = 9;
/// Longest hand-over with overlap, without the decode step, in microseconds.
const MOST: i64 = 10_000;

const NO_TIMES: &str = "the prefill engine reported no times";

/// The times of one request, in microseconds since it was sent.
struct Seen {
    queued: i64,
    first_chunk: i64,
    computed: i64,
    loaded: i64,
    admitted: i64,
    first_token: i64,
    /// One decode step.
    step: i64,
    /// At the client: the prefill engine's answer, and the first token.
    prefilled: i64,
    at_client: i64,
}

impl Seen {
    fn new(sent: u64, (prefill, prefilled): (&Times, Duration), decode: &Reply) -> Result<Self> {
        let since = |t: u64| t as i64 - sent as i64;
        let d = decode.times.context("the decode engine reported no times")?;
        Ok(Self {
            queued: since(prefill.queued),
            first_chunk: since(prefill.first_chunk),
            computed: since(prefill.first_token),
            loaded: since(d.loaded),
            admitted: since(d.admitted),
            first_token: since(d.first_token),
            step: (d.last_token - d.first_token) as i64 / (ANSWER as i64 - 1),
            prefilled: prefilled.as_micros() as i64,
            at_client: decode.first.as_micros() as i64,
        })
    }

    /// From the last computed chunk to the first decode token, without the step that computes that token.
    fn handover(&self) -> i64 {
        self.first_token - self.computed - self.step
    }

    fn columns(&self) -> [i64; 10] {
        let Self { queued, first_chunk, computed, loaded, admitted, first_token, step, prefilled, at_client } = *self;
        [queued, first_chunk, computed, loaded, admitted, first_token, step, self.handover(), prefilled, at_client]
    }
}

const NAMES: [&str; 10] = [
    "queued",
    "first chunk",
    "last chunk",
    "loaded",
    "admitted",
    "first token",
    "step",
    "hand-over",
    "prefilled",
    "at client",
];

fn ms(micros: i64) -> String {
    format!("{:.1}", micros as f64 / 1e3)
}

/// The median of these times.
fn middle(all: &[Seen], of: impl Fn(&Seen) -> i64) -> i64 {
    let mut all: Vec<_> = all.iter().map(of).collect();
    all.sort_unstable();
    all.get(all.len() / 2).copied().unwrap_or_default()
}

/// Prints a row: one request, or the medians of several.
fn row(name: &str, flow: &str, all: &[Seen]) {
    let columns = (0..NAMES.len()).map(|i| format!(" {:>11}", ms(middle(all, |s| s.columns()[i]))));
    println!("{name:<8} {flow:<10}{}", columns.collect::<String>());
}

struct Pair {
    client: Client,
    prefill: String,
    decode: String,
    identity: Identity,
}

impl Pair {
    async fn computed(&self, ask: &Ask, transfer: Transfer) -> Result<Answer> {
        let transfer = Transfer { do_remote_decode: true, ..transfer };
        let ask = Ask { max_tokens: 1, kv_transfer_params: Some(transfer), ..ask.clone() };
        self.client.whole(&self.prefill, &ask).await
    }

    async fn decoded(&self, ask: &Ask, transfer: Transfer) -> Result<Reply> {
        let transfer = Transfer { do_remote_prefill: true, ..transfer };
        Ok(self.client.ask(&self.decode, &Ask { kv_transfer_params: Some(transfer), ..ask.clone() }).await?)
    }

    async fn one_after_the_other(&self, ask: &Ask) -> Result<Seen> {
        let (sent, began) = (Times::now(), Instant::now());
        let made = self.computed(ask, Transfer::default()).await?;
        let before = began.elapsed();
        let offer = made.kv_transfer_params.context("the prefill engine made no offer")?;
        let mut reply = self.decoded(ask, offer).await?;
        reply.first += before;
        Seen::new(sent, (&made.times.context(NO_TIMES)?, before), &reply)
    }

    async fn at_the_same_time(&self, ask: &Ask) -> Result<Seen> {
        let transfer = Transfer {
            transfer_id: Some(Token::random().into()),
            source: self.identity.source.clone(),
            ..Transfer::default()
        };
        let (sent, began) = (Times::now(), Instant::now());
        let computed = async { (self.computed(ask, transfer.clone()).await, began.elapsed()) };
        let ((made, prefilled), reply) = tokio::join!(computed, self.decoded(ask, transfer.clone()));
        Seen::new(sent, (&made?.times.context(NO_TIMES)?, prefilled), &reply?)
    }
}

/// A prompt of exactly this many tokens, which no prefix cache contains.
fn prompt(tokens: u64, seed: u64) -> Ask {
    let mut state = seed;
    // Tokens of every model here. SplitMix64.
    let mut next = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        ((z ^ (z >> 27)) % 200) as u32 + 33
    };
    let tokens = (0..tokens).map(|_| next()).collect();
    Ask { prompt: Prompt::Tokens(tokens), max_tokens: ANSWER, ignore_eos: true, ..Ask::default() }
}

/// Runs the measurement. `false` if the hand-over is longer than it should be.
pub async fn run(model: &str, lengths: &[u64], rounds: usize) -> Result<bool> {
    let mut plan = Plan::new(std::env::current_exe()?, model);
    plan.blocks = 4096;
    let fleet = Fleet::start(&plan)?;
    let client = Client::new()?;
    let (prefill, decode) = (fleet.prefill[0].lock().addr().to_owned(), fleet.decode_addrs().remove(0));
    let identity = client.identity(&prefill).await?;
    let pair = Pair { client, prefill, decode, identity };
    let mut report = Report::default();

    println!("milliseconds since the request was sent; one thread per engine; `=`: medians of {rounds}");
    println!("{:<8} {:<10}{}", "tokens", "flow", NAMES.map(|n| format!(" {n:>11}")).concat());
    for &tokens in lengths {
        let (mut sequential, mut overlap) = (Vec::new(), Vec::new());
        for round in 0..=rounds {
            let seed = |flow: u64| tokens * 1_000_003 + round as u64 * 2 + flow;
            let one = pair.one_after_the_other(&prompt(tokens, seed(0))).await?;
            let both = pair.at_the_same_time(&prompt(tokens, seed(1))).await?;
            // The first round opens connections and lanes.
            if round > 0 {
                row(&tokens.to_string(), "sequential", std::slice::from_ref(&one));
                row(&tokens.to_string(), "overlap", std::slice::from_ref(&both));
                sequential.push(one);
                overlap.push(both);
            }
        }
        row(&format!("={tokens}"), "sequential", &sequential);
        row(&format!("={tokens}"), "overlap", &overlap);
        let (before, after) = (middle(&sequential, Seen::handover), middle(&overlap, Seen::handover));
        let text = format!("{} ms and a decode step, for {} ms in sequence", ms(after), ms(before));
        report.saw(&format!("hand-over, {tokens}"), after <= MOST, text);
        let (late, step) = (middle(&overlap, |s| s.at_client - s.prefilled), middle(&overlap, |s| s.step));
        let text = format!("{} ms after the prefill's answer; a decode step takes {} ms", ms(late), ms(step));
        report.saw(&format!("first token, {tokens}"), late <= 2 * step, text);
    }
    Ok(report.print())
}
