//! Hello, the handshake: identities, models and memory layouts. The answer is a pure function of both sides.

use std::{sync::Arc, time::Duration};

use crate::{Incarnation, LaneKind, Mismatch, Model, PeerId, PoolLayout, Shard};

/// The protocol versions that this build speaks, both ends included. Version 1 took block lists from names.
pub const VERSIONS: (u32, u32) = (2, 2);

/// Feature bits. A feature is used when both sides have it.
pub mod features {
    /// Several readers of one engine may share an offer.
    pub const READERS: u64 = 1 << 0;
    /// All features of this build.
    pub const ALL: u64 = READERS;
}

/// The first message of a consumer rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Lowest and highest version that it speaks.
    pub versions: (u32, u32),
    /// Its feature bits.
    pub features: u64,
    /// Its identity.
    pub peer: PeerId,
    /// Its model.
    pub model: Model,
    /// Its part of the model.
    pub shard: Shard,
    /// Its host, see [`Welcome::host`].
    pub host: String,
}

/// The answer of a producer rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Welcome {
    /// The version that both sides use.
    pub version: u32,
    /// The features that both sides have.
    pub features: u64,
    /// Its identity.
    pub peer: PeerId,
    /// Its engine's incarnation.
    pub engine_incarnation: Incarnation,
    /// Its model.
    pub model: Model,
    /// Its part of the model.
    pub shard: Shard,
    /// Its memory.
    pub pool: Arc<PoolLayout>,
    /// Words in its fence table.
    pub fence_slots: u32,
    /// Kinds of lanes that it serves, best first.
    pub lanes: Vec<LaneKind>,
    /// Boot id and pid namespace: equal on two ranks that can reach each other's memory.
    pub host: String,
    /// Silence after which it ends a session.
    pub silence: Duration,
    /// UUID of the GPU that holds its pool; `None`: the pool is host memory.
    pub gpu_uuid: Option<[u8; 16]>,
}

/// Checks a consumer's Hello against this producer's model. Returns the highest common version.
///
/// # Errors
/// The models differ, or there is no common version.
pub fn answer(hello: &Hello, model: &Model) -> Result<u32, Mismatch> {
    let (low, high) = (hello.versions.0.max(VERSIONS.0), hello.versions.1.min(VERSIONS.1));
    if low > high {
        let range = |(a, b): (u32, u32)| format!("{a} to {b}");
        return Err(Mismatch { field: "version".into(), consumer: range(hello.versions), producer: range(VERSIONS) });
    }
    Model::matches(&hello.model, model)?;
    Ok(high)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rank;

    fn hello(versions: (u32, u32)) -> Hello {
        Hello {
            versions,
            features: features::ALL,
            peer: PeerId { engine: "e".parse().unwrap(), rank: Rank(0), incarnation: Incarnation::random() },
            model: model(),
            shard: Shard::whole(8, 4),
            host: String::new(),
        }
    }

    fn model() -> Model {
        Model {
            name: "m".into(),
            dtype: "float32".into(),
            scales: String::new(),
            weights: String::new(),
            attention: "HND".into(),
            block_tokens: 16,
        }
    }

    #[test]
    fn the_highest_common_version_is_used_and_none_is_refused_by_name() {
        assert_eq!(answer(&hello((1, 9)), &model()), Ok(2));
        let no = answer(&hello((7, 9)), &model()).unwrap_err();
        assert_eq!((no.field.as_str(), no.consumer.as_str()), ("version", "7 to 9"));
        let no = answer(&hello((9, 7)), &model()).unwrap_err();
        assert_eq!(no.field, "version");
    }
}
