//! The reasons for which lanes went down, from the log of this process.

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

/// The reasons since the last call.
pub fn reasons() -> Vec<String> {
    // The first call sets it; later calls fail, which has no effect.
    let _ = tracing::subscriber::set_global_default(Listener);
    std::mem::take(&mut *REASONS.lock().unwrap_or_else(PoisonError::into_inner))
}

struct Listener;

impl Subscriber for Listener {
    fn enabled(&self, m: &Metadata<'_>) -> bool {
        m.target().contains("verbs") && m.fields().field("reason").is_some()
    }

    fn event(&self, event: &Event<'_>) {
        event.record(&mut Reason);
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

struct Reason;

impl Visit for Reason {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "reason" {
            REASONS.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{value:?}"));
        }
    }
}
