//! A TCP proxy whose connections can be forgotten, as a stateful router forgets idle ones: their bytes vanish, no end of them
//! hears of it, and new connections work.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

pub(crate) struct Proxy {
    pub(crate) addr: String,
    /// Connections with a lower number carry nothing.
    forgotten: Arc<AtomicUsize>,
    accepted: Arc<AtomicUsize>,
}

impl Proxy {
    /// Passes connections on to `to`.
    pub(crate) fn new(to: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let addr = listener.local_addr().expect("bound").to_string();
        let (forgotten, accepted) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let (to, below, count) = (to.to_owned(), forgotten.clone(), accepted.clone());
        thread::spawn(move || {
            for near in listener.incoming().flatten() {
                let number = count.fetch_add(1, Ordering::SeqCst);
                let Ok(far) = TcpStream::connect(&to) else { continue };
                for (from, into) in [(&near, &far), (&far, &near)] {
                    let (from, into) = (from.try_clone().expect("a copy"), into.try_clone().expect("a copy"));
                    let below = below.clone();
                    thread::spawn(move || pump(from, into, || number < below.load(Ordering::SeqCst)));
                }
            }
        });
        Self { addr, forgotten, accepted }
    }

    /// Forgets all present connections.
    pub(crate) fn forget(&self) {
        self.forgotten.store(self.accepted.load(Ordering::SeqCst), Ordering::SeqCst);
    }

    /// Number of connections so far.
    pub(crate) fn connections(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }
}

fn pump(mut from: TcpStream, mut into: TcpStream, forgotten: impl Fn() -> bool) {
    let mut bytes = [0; 1 << 16];
    while let Ok(n @ 1..) = from.read(&mut bytes) {
        if !forgotten() && into.write_all(&bytes[..n]).is_err() {
            break;
        }
    }
    if !forgotten() {
        let _ = into.shutdown(Shutdown::Write);
    }
}
