//! Prompts that are generated from a seed, with a given length, in groups with a common beginning.

/// A text generator: the same seed gives the same text.
pub struct Writer(u64);

impl Writer {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn pick<'a>(&mut self, from: &[&'a str]) -> &'a str {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        from[(self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % from.len()]
    }

    /// About 15 tokens of a language model, 80 bytes.
    pub fn sentence(&mut self) -> String {
        let who = [
            "The harbour pilot",
            "An old captain",
            "The night watch",
            "A young engineer",
            "The ferry's cook",
            "A customs officer",
        ];
        let does = ["wrote down", "had counted", "was looking for", "forgot about", "asked for", "kept hold of"];
        let what = [
            "forty crates of salt",
            "the tide tables",
            "a broken lantern",
            "two letters from Lisbon",
            "a coil of rope",
            "the engine's log",
        ];
        let when = [
            "before the storm",
            "at low water",
            "on a Tuesday morning",
            "after the last bell",
            "while the fog lasted",
            "in the spring",
        ];
        let place = [
            "at the northern pier",
            "below deck",
            "near the lighthouse",
            "across the bay",
            "in the dry dock",
            "behind the fish market",
        ];
        let parts = [&who[..], &does, &what, &place, &when].map(|list| self.pick(list));
        format!("{}.", parts.join(" "))
    }

    /// At least this many bytes of text.
    pub fn text(&mut self, bytes: usize) -> String {
        let mut text = String::new();
        while text.len() < bytes {
            text.push_str(&self.sentence());
            text.push(' ');
        }
        text
    }
}

/// `n` different prompts in groups that share their first `shared` bytes; `own` bytes of each are unique.
pub fn prompts(n: usize, groups: usize, shared: usize, own: usize, seed: u64) -> Vec<String> {
    let begin = |g: usize| Writer::new(seed * 1000 + g as u64).text(shared);
    let begins: Vec<_> = (0..groups.max(1)).map(begin).collect();
    (0..n)
        .map(|i| {
            let mine = Writer::new(seed * 1_000_003 + i as u64 + 77).text(own);
            let begin = &begins[i % begins.len()];
            format!("{begin}Report number {i} says: {mine}In one sentence, report {i} is about")
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_prompts_differ_and_groups_share_their_beginning() {
        let all = prompts(20, 2, 300, 100, 1);
        assert_eq!(all.iter().collect::<std::collections::HashSet<_>>().len(), 20);
        assert_eq!(all[0][..300], all[2][..300]);
        assert_ne!(all[0][..300], all[1][..300]);
        assert_eq!(all, prompts(20, 2, 300, 100, 1));
    }
}
