//! Text to tokens and back.

use anyhow::{Result, anyhow};
use candle_core::quantized::{gguf_file::Content, tokenizer::TokenizerFromGguf as _};
use tokenizers::{
    Tokenizer,
    pre_tokenizers::{PreTokenizerWrapper, byte_level::ByteLevel, digits::Digits, sequence::Sequence},
};

/// A tokeniser.
#[derive(Clone)]
pub struct Text(Option<Box<Tokenizer>>);

impl Text {
    /// The tokeniser in a model's file.
    pub fn from_gguf(content: &Content) -> Result<Self> {
        let mut t = Tokenizer::from_gguf(content).map_err(|e| anyhow!("the model's tokeniser is invalid: {e}"))?;
        let pre = content.metadata.get("tokenizer.ggml.pre").and_then(|v| v.to_string().ok());
        if pre.is_some_and(|p| p == "smollm") {
            // Like GPT-2, but each digit is a token.
            let parts = vec![Digits::new(true).into(), ByteLevel::new(false, true, true).into()];
            t.with_pre_tokenizer(Some(PreTokenizerWrapper::Sequence(Sequence::new(parts))));
        }
        Ok(Self(Some(Box::new(t))))
    }

    /// One token per byte.
    pub fn bytes() -> Self {
        Self(None)
    }

    /// The tokens of a text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        match &self.0 {
            Some(t) => {
                Ok(t.encode(text, true).map_err(|e| anyhow!("the prompt cannot be encoded: {e}"))?.get_ids().to_vec())
            }
            None => Ok(text.bytes().map(u32::from).collect()),
        }
    }

    /// The text of tokens. Invalid UTF-8 becomes replacement characters.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        match &self.0 {
            Some(t) => t.decode(tokens, true).map_err(|e| anyhow!("the tokens cannot be decoded: {e}")),
            None => {
                let bytes: Vec<u8> = tokens.iter().map(|t| (*t & 255) as u8).collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
        }
    }
}
