//! The properties of a model that must be equal on both sides for KV bytes to mean the same thing. A difference is refused
//! with the name of the field.

use serde::{Deserialize, Serialize};

/// The meaning of a block's bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Model {
    /// Model name.
    pub name: String,
    /// Data type of the cache, such as `bfloat16`.
    pub dtype: String,
    /// How quantisation scales are stored; empty for none.
    pub scales: String,
    /// Fingerprint of the weights; empty: none was made. Two models of one name and shape may have other weights.
    pub weights: String,
    /// Attention layout inside a block, such as `HND`.
    pub attention: String,
    /// Tokens in a block of the first group.
    pub block_tokens: u32,
}

/// Two sides that must not exchange KV.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} mismatch: {consumer:?} here, {producer:?} at the producer; start both with the same {field}")]
pub struct Mismatch {
    /// The field's name.
    pub field: String,
    /// The consumer's value.
    pub consumer: String,
    /// The producer's value.
    pub producer: String,
}

impl Model {
    /// Longest text of a field, in bytes.
    pub const MAX_TEXT: usize = 256;

    /// Compares a consumer's model with a producer's.
    ///
    /// # Errors
    /// The first field that differs, with both values.
    pub fn matches(consumer: &Model, producer: &Model) -> Result<(), Mismatch> {
        let text = [
            ("model", &consumer.name, &producer.name),
            ("dtype", &consumer.dtype, &producer.dtype),
            ("scales", &consumer.scales, &producer.scales),
            ("weights", &consumer.weights, &producer.weights),
            ("attention", &consumer.attention, &producer.attention),
        ];
        for (field, c, p) in text {
            if c != p {
                return Err(Mismatch { field: field.into(), consumer: c.clone(), producer: p.clone() });
            }
        }
        if consumer.block_tokens != producer.block_tokens {
            return Err(Mismatch {
                field: "block_tokens".into(),
                consumer: consumer.block_tokens.to_string(),
                producer: producer.block_tokens.to_string(),
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mismatch_names_the_field_and_both_values() {
        let a = Model {
            name: "m".into(),
            dtype: "bfloat16".into(),
            scales: String::new(),
            weights: String::new(),
            attention: "HND".into(),
            block_tokens: 16,
        };
        assert_eq!(Model::matches(&a, &a), Ok(()));
        let b = Model { dtype: "fp8_e4m3".into(), ..a.clone() };
        let said = Model::matches(&a, &b).unwrap_err().to_string();
        assert!(["dtype", "bfloat16", "fp8_e4m3"].iter().all(|w| said.contains(w)), "{said}");
        let retrained = Model { weights: "9f".into(), ..a.clone() };
        let said = Model::matches(&a, &retrained).unwrap_err().to_string();
        assert!(["weights", "9f"].iter().all(|w| said.contains(w)), "{said}");
        let c = Model { block_tokens: 32, ..a.clone() };
        let said = Model::matches(&a, &c).unwrap_err().to_string();
        assert!(["block_tokens", "16", "32"].iter().all(|w| said.contains(w)), "{said}");
    }
}
