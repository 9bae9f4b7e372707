//! The thread that carries packets between the two devices of a wire. It owns both paths. Other threads change them
//! with [`Forwarder::tell`], which sends it a function and waits until that has run.

use std::{
    os::fd::{AsFd as _, OwnedFd},
    sync::{
        Arc,
        mpsc::{Receiver, Sender, TryRecvError, channel},
    },
    thread::JoinHandle,
    time::Instant,
};

use fastrand::Rng;
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    io::{Errno, read, write},
};

use super::path::Path;

/// The paths to the far and to the near end, as [`super::Direction`] counts them.
pub(super) type Paths = [Path; 2];
/// The devices of the near and of the far end.
type Ends = [OwnedFd; 2];
type Command = Box<dyn FnOnce(&mut Paths) + Send>;

/// Most packets of one direction that it carries before it looks at the other direction and at commands.
const BATCH: usize = 64;

#[derive(Debug)]
pub(super) struct Forwarder {
    /// `None` tells the thread to end.
    commands: Option<Sender<Command>>,
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<Ends>>,
}

impl Forwarder {
    pub(super) fn start(ends: Ends, seed: u64) -> std::io::Result<Self> {
        let mut rng = Rng::with_seed(seed);
        let paths = [Path::new(rng.fork()), Path::new(rng.fork())];
        let (commands, receiver) = channel();
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let woken = wake.clone();
        let thread = std::thread::Builder::new()
            .name("wire".into())
            .spawn(move || Running { ends, paths, wake: woken }.run(&receiver))?;
        Ok(Self { commands: Some(commands), wake, thread: Some(thread) })
    }

    /// Runs `work` on the forwarder's thread, between two packets.
    pub(super) fn tell<T: Send + 'static>(&self, work: impl FnOnce(&mut Paths) -> T + Send + 'static) -> T {
        let (answer, answered) = channel();
        let command: Command = Box::new(move |paths| drop(answer.send(work(paths))));
        let sent = self.commands.as_ref().is_some_and(|c| c.send(command).is_ok());
        self.wake();
        let answer = if sent { answered.recv().ok() } else { None };
        answer.expect("the forwarder of this wire runs (if not, its panic is above)")
    }

    /// Ends the thread, and returns the devices; `None` if it panicked or has ended before.
    pub(super) fn stop(&mut self) -> Option<Ends> {
        self.commands = None;
        self.wake();
        // Its panic has been printed already. Another one here would abort the process.
        self.thread.take()?.join().ok()
    }

    fn wake(&self) {
        // It fails only when the counter is full, and then the thread is awake.
        let _ = write(&self.wake, &1u64.to_ne_bytes());
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Running {
    ends: Ends,
    paths: Paths,
    wake: Arc<OwnedFd>,
}

impl Running {
    fn run(mut self, commands: &Receiver<Command>) -> Ends {
        // A device returns no packet that is larger than its MTU.
        let mut buffer = vec![0; 1 << 16];
        loop {
            loop {
                match commands.try_recv() {
                    Ok(command) => command(&mut self.paths),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return self.ends,
                }
            }
            let ready = self.sleep();
            for (direction, ready) in ready.into_iter().enumerate() {
                self.forward(direction, ready, &mut buffer);
            }
        }
    }

    /// Sleeps until there is work. Returns which ends have packets.
    fn sleep(&self) -> [bool; 2] {
        let next = self.paths.iter().filter_map(Path::next).min();
        let timeout = next.map(|at| {
            let left = at.saturating_duration_since(Instant::now());
            Timespec::try_from(left).expect("a delay that a clock can tell")
        });
        let [near, far] = &self.ends;
        let mut events = [near, far, &*self.wake].map(|fd| PollFd::new(fd, PollFlags::IN));
        match poll(&mut events, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => panic!("poll: {e}"),
        }
        if !events[2].revents().is_empty() {
            let _ = read(&*self.wake, &mut [0; 8]);
        }
        [0, 1].map(|i| !events[i].revents().is_empty())
    }

    fn forward(&mut self, direction: usize, ready: bool, buffer: &mut [u8]) {
        let path = &mut self.paths[direction];
        let to = self.ends[1 - direction].as_fd();
        // A packet that the kernel refuses is lost, as on any network.
        let mut out = |packet: &[u8]| {
            let _ = write(to, packet);
        };
        path.advance(Instant::now(), &mut out);
        if !ready {
            return;
        }
        for _ in 0..BATCH {
            match read(&self.ends[direction], &mut *buffer) {
                // The kernel itself sends neighbour and router messages of IPv6. They would draw from the generator and
                // change which of the test's packets a seed affects.
                Ok(n) if n > 0 && buffer[0] >> 4 == 4 => path.send(Instant::now(), &buffer[..n], &mut out),
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(e) => panic!("reading from the device of a wire: {e}"),
            }
        }
    }
}
