//! `decode-engine ttft --hand-over`: the time from the last computed chunk of a prompt to the decode engine's first token, one
//! engine after the other beside both at the same time.
//!
//! The command takes the part of the router, so that it gets the times that both engines report. All are of one clock. Prefill and
//! decode engines have one thread each, and are idle otherwise.

use std::time::Duration;

use anyhow::{Context as _, Result};
use kvferry::Token;

use crate::{
    api::{Answer, Ask, Identity, Prompt, Times, Transfer},
    client::{Client, Reply},
    fleet::{Fleet, Plan},
    report::{Report, median},
};

/// Tokens of an answer: the time between two of them is a decode step.
const ANSWER: usize = 9;

/// The times of one request, from the moment at which it was sent.
struct Seen {
    queued: Duration,
    first_chunk: Duration,
    computed: Duration,
    loaded: Duration,
    admitted: Duration,
    first_token: Duration,
    /// One decode step.
    step: Duration,
    /// At the client, the first token.
    at_client: Duration,
}

impl Seen {
    fn new(sent: u64, prefill: &Times, decode: &Reply) -> Result<Self> {
        let since = |t: u64| Duration::from_micros(t.saturating_sub(sent));
        let d = decode.times.context("the decode engine reported no times")?;
        let steps = (ANSWER - 1) as u32;
        Ok(Self {
            queued: since(prefill.queued),
            first_chunk: since(prefill.first_chunk),
            computed: since(prefill.first_token),
            loaded: since(d.loaded),
            admitted: since(d.admitted),
            first_token: since(d.first_token),
            step: Duration::from_micros(d.last_token.saturating_sub(d.first_token)) / steps,
            at_client: decode.first,
        })
    }

    /// From the last computed chunk to the first decode token, without the step that computes that token.
    fn handover(&self) -> Duration {
        self.first_token.saturating_sub(self.computed).saturating_sub(self.step)
    }

    /// The time that the prompt takes on the prefill engine, its queue included.
    fn prefill(&self) -> Duration {
        self.computed.saturating_sub(self.queued)
    }

    fn columns(&self) -> [Duration; 8] {
        let Self { queued, first_chunk, computed, loaded, admitted, first_token, step, .. } = *self;
        [queued, first_chunk, computed, loaded, admitted, first_token, step, self.handover()]
    }
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
        let (sent, began) = (Times::now(), std::time::Instant::now());
        let made = self.computed(ask, Transfer::default()).await?;
        let before = began.elapsed();
        let offer = made.kv_transfer_params.context("the prefill engine made no offer")?;
        let mut reply = self.decoded(ask, offer).await?;
        reply.first += before;
        Seen::new(sent, &made.times.context("the prefill engine reported no times")?, &reply)
    }

    async fn at_the_same_time(&self, ask: &Ask) -> Result<Seen> {
        let transfer = Transfer {
            transfer_id: Some(Token::random().into()),
            source: self.identity.source.clone(),
            ..Transfer::default()
        };
        let sent = Times::now();
        let (made, reply) = tokio::join!(self.computed(ask, transfer.clone()), self.decoded(ask, transfer));
        Seen::new(sent, &made?.times.context("the prefill engine reported no times")?, &reply?)
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
    let ms = |d: Duration| format!("{:.1}", d.as_secs_f64() * 1e3);

    println!("milliseconds since the request was sent; one thread per engine; medians of {rounds}");
    let names = ["queued", "first chunk", "last chunk", "loaded", "admitted", "first token", "step", "hand-over"];
    let header: String = names.iter().map(|n| format!(" {n:>11}")).collect();
    println!("{:<8} {:<10}{header} {:>11} {:>11}", "tokens", "flow", "at client", "prefill");
    for &tokens in lengths {
        let (mut sequential, mut overlap) = (Vec::new(), Vec::new());
        for round in 0..=rounds {
            let seed = |flow: u64| tokens * 1_000_003 + round as u64 * 2 + flow;
            let one = pair.one_after_the_other(&prompt(tokens, seed(0))).await?;
            let both = pair.at_the_same_time(&prompt(tokens, seed(1))).await?;
            // The first round opens connections and lanes.
            if round > 0 {
                sequential.push(one);
                overlap.push(both);
            }
        }
        let line = |flow: &str, all: &[Seen], row: &str| {
            let of = |i: usize| median(&all.iter().map(|s| s.columns()[i]).collect::<Vec<_>>());
            let columns: String = (0..names.len()).map(|i| format!(" {:>11}", ms(of(i)))).collect();
            let client = median(&all.iter().map(|s| s.at_client).collect::<Vec<_>>());
            let prefill = median(&all.iter().map(Seen::prefill).collect::<Vec<_>>());
            println!("{row:<8} {flow:<10}{columns} {:>11} {:>11}", ms(client), ms(prefill));
        };
        for (flow, all) in [("sequential", &sequential), ("overlap", &overlap)] {
            for one in all {
                line(flow, std::slice::from_ref(one), &tokens.to_string());
            }
        }
        for (flow, all) in [("sequential", &sequential), ("overlap", &overlap)] {
            line(flow, all, &format!("={tokens}"));
        }
        let handover = median(&overlap.iter().map(Seen::handover).collect::<Vec<_>>());
        let text = format!(
            "{} ms, for {} ms in sequence",
            ms(handover),
            ms(median(&sequential.iter().map(Seen::handover).collect::<Vec<_>>()))
        );
        report.saw(&format!("hand-over, {tokens}"), handover <= Duration::from_millis(10), text);
        let late = |s: &Seen| s.at_client.saturating_sub(s.prefill());
        let (late, step) = (
            median(&overlap.iter().map(late).collect::<Vec<_>>()),
            median(&overlap.iter().map(|s| s.step).collect::<Vec<_>>()),
        );
        let text = format!("{} ms after the prefill's own time; a step takes {} ms", ms(late), ms(step));
        report.saw(&format!("first token, {tokens}"), late <= 2 * step, text);
    }
    Ok(report.print())
}
