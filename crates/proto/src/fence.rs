//! The fence: the check, after the data, that the offer was still live when the last byte was read.
//!
//! A word of the producer's fence table holds the offer's random nonce while the offer is live. Revoking stores zero, then
//! executes a full memory fence, and only then gives the blocks back. A reader that finds the nonce *after* its data has
//! arrived knows that none of the data was overwritten: the word would have been cleared before. The nonce is random, so a
//! word that was cleared and given to another offer never looks live to the first offer's readers.

use crate::Nonce;

/// Whether the word, read after the data, proves the data good.
pub fn holds(nonce: Nonce, word: u64) -> bool {
    word == nonce.get()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_offers_own_nonce_holds() {
        let (a, b) = (Nonce::random(), Nonce::random());
        assert!(holds(a, a.get()));
        assert!(!holds(a, 0), "a revoked word never holds");
        assert!(!holds(a, b.get()), "another offer's word never holds");
    }
}
