//! Why lanes went down, as the log of this process says.

use std::{
    fmt::Debug,
    sync::{Mutex, PoisonError},
};

use tracing::{
    Event, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};

static REASONS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// The reasons since this was last asked for.
pub fn reasons() -> Vec<String> {
    // From the first call on; later ones find it set.
    let _ = tracing::subscriber::set_global_default(Listener);
    std::mem::take(&mut *REASONS.lock().unwrap_or_else(PoisonError::into_inner))
}

struct Listener;

impl Subscriber for Listener {
    fn enabled(&self, m: &Metadata<'_>) -> bool {
        m.target().contains("verbs") && m.fields().field("why").is_some()
    }

    fn event(&self, event: &Event<'_>) {
        event.record(&mut Why);
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

struct Why;

impl Visit for Why {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "why" {
            REASONS.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{value:?}"));
        }
    }
}
