//! Models from a GGUF file or from a seed.
//!
//! A seeded model is tiny and its weights are random, but its answers depend on every token of the prompt, and so on every
//! block of KV.

use std::{
    fs::File,
    io::BufReader,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use candle_core::{
    Device, Tensor,
    quantized::{
        QTensor,
        gguf_file::{Content, Value},
    },
};
use sha2::{Digest as _, Sha256};

use crate::{
    kernel::Linear,
    llama::{Config, Embedding, Layer, Llama, Rope},
    text::Text,
};

/// Longest sequence, if the model allows more: as much as two cores can compute.
const LONGEST: usize = 8192;

/// Reads a Llama-type model and its tokeniser from a GGUF file.
pub fn read(path: &Path) -> Result<(Llama, Text)> {
    let open = || File::open(path).with_context(|| format!("cannot open the model {}", path.display()));
    let mut file = open()?;
    let mut hash = Sha256::new();
    std::io::copy(&mut file, &mut Hashing(&mut hash))?;
    let hash: String = hash.finalize()[..8].iter().map(|b| format!("{b:02x}")).collect();

    let mut file = BufReader::new(open()?);
    let content = Content::read(&mut file).with_context(|| format!("{} is not a GGUF file", path.display()))?;
    let get = |key: &str| content.metadata.get(key);
    let number = |key: &str| get(key).and_then(integer);
    let need = |key: &str| number(key).with_context(|| format!("the model's file lacks {key}"));
    let architecture = get("general.architecture").and_then(|v| v.to_string().ok()).map_or("", |s| s);
    ensure!(architecture == "llama", "{architecture:?} models are not supported: use a Llama-type model");

    let heads = need("llama.attention.head_count")?;
    let hidden = need("llama.embedding_length")?;
    ensure!(heads > 0 && hidden.is_multiple_of(heads), "{hidden} values do not divide into {heads} heads");
    let head = number("llama.attention.key_length").unwrap_or(hidden / heads);
    ensure!(head.is_multiple_of(8), "heads of {head} values are not supported: the size must be a multiple of 8");
    if let Some(turned) = number("llama.rope.dimension_count") {
        ensure!(turned == head, "a rotation of {turned} of {head} values is not supported");
    }
    let name = get("general.name").and_then(|v| v.to_string().ok()).map_or("llama", |s| s);
    let float = |key: &str| get(key).and_then(|v| v.to_f32().ok());
    let mut config = Config {
        name: format!("{name} {hash}"),
        layers: need("llama.block_count")?,
        hidden,
        heads,
        kv_heads: number("llama.attention.head_count_kv").unwrap_or(heads),
        head,
        vocab: 0,
        context: number("llama.context_length").unwrap_or(2048).min(LONGEST),
        eps: float("llama.attention.layer_norm_rms_epsilon").unwrap_or(1e-5),
        rope_base: float("llama.rope.freq_base").unwrap_or(10_000.0),
        eos: number("tokenizer.ggml.eos_token_id").map(|t| t as u32),
    };
    ensure!(config.kv_heads > 0 && heads.is_multiple_of(config.kv_heads), "query heads must divide among KV heads");

    let mut tensor = |name: &str| -> Result<QTensor> {
        content.tensor(&mut file, name, &Device::Cpu).with_context(|| format!("the model's file has no valid {name}"))
    };
    let wide = |t: QTensor| t.dequantize(&Device::Cpu);
    let linear = |t: QTensor| Linear::from_gguf(&t);
    let embedding = tensor("token_embd.weight")?;
    config.vocab = embedding.shape().dims2()?.0;
    let mut layers = Vec::with_capacity(config.layers);
    for i in 0..config.layers {
        let mut of = |name: &str| tensor(&format!("blk.{i}.{name}.weight"));
        layers.push(Layer {
            attention_norm: wide(of("attn_norm")?)?,
            q: linear(of("attn_q")?)?,
            k: linear(of("attn_k")?)?,
            v: linear(of("attn_v")?)?,
            o: linear(of("attn_output")?)?,
            ffn_norm: wide(of("ffn_norm")?)?,
            gate: linear(of("ffn_gate")?)?,
            up: linear(of("ffn_up")?)?,
            down: linear(of("ffn_down")?)?,
        });
    }
    let factors = tensor("rope_freqs.weight").ok().map(|t| wide(t)?.to_vec1::<f32>()).transpose()?;
    // Without a matrix of its own, the output uses the embedding's.
    let output = tensor("output.weight").ok();
    let llama = Llama {
        norm: wide(tensor("output_norm.weight")?)?,
        head: linear(output.map_or_else(|| tensor("token_embd.weight"), Ok)?)?,
        embedding: Embedding::Quantised(embedding),
        rope: Rope::new(config.rope_base, head, config.context, factors.as_deref()),
        layers,
        config,
    };
    Ok((llama, Text::from_gguf(&content)?))
}

/// A small model with random weights, and a tokeniser of bytes. The same seed gives the same model everywhere.
pub fn tiny(seed: u64) -> Result<(Llama, Text)> {
    let (layers, hidden, heads, kv_heads, head, ffn, vocab) = (3, 64, 4, 2, 16, 128, 256);
    let mut state = seed;
    let mut noise = |n: usize, spread: f32| -> Vec<f32> {
        let mut next = || {
            // SplitMix64
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next() * spread).collect()
    };
    let ones = || Tensor::ones(hidden, candle_core::DType::F32, &Device::Cpu);
    // The spread is wide enough that attention selects a few past tokens, different ones for each token. So the answer
    // depends on the whole prompt.
    let mut linear = |n: usize, k: usize, gain: f32| Linear::new(&noise(n * k, gain / (k as f32).sqrt()), n, k);
    let mut all = Vec::new();
    for _ in 0..layers {
        all.push(Layer {
            attention_norm: ones()?,
            q: linear(heads * head, hidden, 5.0),
            k: linear(kv_heads * head, hidden, 5.0),
            v: linear(kv_heads * head, hidden, 3.0),
            o: linear(hidden, heads * head, 3.0),
            ffn_norm: ones()?,
            gate: linear(ffn, hidden, 2.0),
            up: linear(ffn, hidden, 2.0),
            down: linear(hidden, ffn, 2.0),
        });
    }
    let output = linear(vocab, hidden, 2.0);
    let embedding = Tensor::from_vec(noise(vocab * hidden, 0.5), (vocab, hidden), &Device::Cpu)?;
    let config = Config {
        name: format!("tiny {seed}"),
        layers,
        hidden,
        heads,
        kv_heads,
        head,
        vocab,
        context: 8192,
        eps: 1e-5,
        rope_base: 10_000.0,
        eos: None,
    };
    let rope = Rope::new(config.rope_base, head, config.context, None);
    let llama = Llama { embedding: Embedding::Full(embedding), layers: all, norm: ones()?, head: output, rope, config };
    Ok((llama, Text::bytes()))
}

fn integer(v: &Value) -> Option<usize> {
    match v {
        Value::U8(n) => Some(usize::from(*n)),
        Value::U16(n) => Some(usize::from(*n)),
        Value::U32(n) => usize::try_from(*n).ok(),
        Value::U64(n) => usize::try_from(*n).ok(),
        Value::I32(n) => usize::try_from(*n).ok(),
        Value::I64(n) => usize::try_from(*n).ok(),
        _ => None,
    }
}

/// The path at which `fetch-model` stores the model.
pub fn fetched() -> PathBuf {
    let home = || std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".cache"));
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home).unwrap_or_default();
    cache.join("kvferry/SmolLM2-135M-Instruct.Q4_1.gguf")
}

struct Hashing<'a>(&'a mut Sha256);

impl std::io::Write for Hashing<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Loads a model: `smollm2`, `tiny`, `tiny:SEED`, or a GGUF file.
pub fn load(model: &str) -> Result<(Llama, Text)> {
    match model.split_once(':').unwrap_or((model, "")) {
        ("tiny", "") => tiny(1),
        ("tiny", seed) => tiny(seed.parse().context("SEED of tiny:SEED must be a number")?),
        ("smollm2", _) => {
            let path = fetched();
            ensure!(path.is_file(), "{} does not exist: run examples/decode_engine/fetch-model", path.display());
            read(&path)
        }
        _ if Path::new(model).is_file() => read(Path::new(model)),
        _ => bail!("there is no model {model}: use a GGUF file, `smollm2` (fetched by fetch-model), or `tiny`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        kv::{BLOCK, Kv},
        llama::{Batch, Span, greedy},
        prompts::prompts,
    };
    use kvferry::BlockId;

    /// Runs a prompt in pieces of this size, then generates.
    fn answer(model: &Llama, kv: &Kv, prompt: &[u32], piece: usize, tokens: usize) -> Result<Vec<u32>> {
        let table: Vec<_> = (0..(prompt.len() + tokens).div_ceil(BLOCK) as u32).map(BlockId).collect();
        let mut all = prompt.to_vec();
        let mut first = 0;
        while all.len() < prompt.len() + tokens {
            let end = all.len().min(first + piece);
            let span = Span { rows: 0..end - first, first, table: table.clone(), logits: end == all.len() };
            let logits = model.forward(&Batch { tokens: all[first..end].to_vec(), spans: vec![span] }, kv)?;
            all.extend(logits.first().map(|l| greedy(l)));
            first = end;
        }
        Ok(all[prompt.len()..].to_vec())
    }

    #[test]
    fn answers_of_the_tiny_model_depend_on_the_prompt() -> Result<()> {
        let (model, text) = tiny(1)?;
        let kv = model.cache(64)?;
        let mut seen = std::collections::HashSet::new();
        let (mut told, mut all) = (0, 0);
        for prompt in prompts(6, 1, 50, 50, 5) {
            let prompt = text.encode(&prompt)?;
            let right = answer(&model, &kv, &prompt, 1000, 8)?;
            assert!(
                right.iter().collect::<std::collections::HashSet<_>>().len() > 3,
                "the answer repeats itself: {right:?}"
            );
            // Nearly every block of the prompt changes the answer.
            for block in 0..prompt.len() / BLOCK - 1 {
                let mut other = prompt.clone();
                other[block * BLOCK..(block + 1) * BLOCK].fill(7);
                told += usize::from(answer(&model, &kv, &other, 1000, 8)? != right);
                all += 1;
            }
            seen.insert(right);
        }
        assert_eq!(seen.len(), 6);
        assert!(told * 10 >= all * 9, "{told} of {all} blocks change the answer");
        Ok(())
    }

    #[test]
    fn an_answer_does_not_depend_on_the_pieces_of_the_prompt() -> Result<()> {
        let (model, text) = tiny(2)?;
        let kv = model.cache(64)?;
        let prompt = text.encode(&prompts(1, 1, 300, 200, 6)[0])?;
        let right = answer(&model, &kv, &prompt, 1000, 8)?;
        for piece in [1, 2, 3, 16, 17, 100] {
            assert_eq!(answer(&model, &kv, &prompt, piece, 8)?, right, "in pieces of {piece}");
        }
        Ok(())
    }
}
