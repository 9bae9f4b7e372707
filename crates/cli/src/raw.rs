//! Bare copies, to compare lanes with: the same scattered blocks without a protocol.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    os::fd::AsFd as _,
    process::{Child, Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use kvferry::{LaneKind, Memory, Span};
use kvferry_testkit::serve::Ready;

use crate::{args, bare, perftest::Perftest, report::Failure};

/// The sources and the destination of bare copies.
pub(crate) struct Raw {
    memory: Memory,
    producer: Ready,
    /// A pool of the producer's shape, for memcpy.
    source: Option<Memory>,
    stream: Option<(TcpStream, Child)>,
    perftest: Option<Perftest>,
}

impl Raw {
    /// Copies into `memory`. For verbs, perftest measures instead.
    pub(crate) fn new(memory: &Memory, producer: Option<Ready>, perftest: Option<Perftest>) -> Result<Self, Failure> {
        let producer =
            producer.ok_or_else(|| Failure::usage("--vs-raw needs both ends on this machine: leave out --connect"))?;
        Ok(Self { memory: memory.clone(), producer, source: None, stream: None, perftest })
    }

    /// Copies blocks `src` of `size` bytes to blocks 0, 1, 2, … and returns the time.
    pub(crate) fn copy(&mut self, lane: LaneKind, size: u64, src: &[u32]) -> Result<Duration, Failure> {
        match lane {
            LaneKind::Local if self.memory.memfds().is_some() => self.memcpy(size, src),
            LaneKind::Local => self.read_process(size, src),
            LaneKind::Verbs => self.perftest()?.bandwidth(size, size * src.len() as u64),
            _ => self.stream(size * src.len() as u64),
        }
    }

    /// The median of `n` bare READs of `size` bytes, one at a time.
    pub(crate) fn one_read(&mut self, size: u64, n: u64) -> Result<Duration, Failure> {
        self.perftest()?.latency(size, n)
    }

    fn perftest(&mut self) -> Result<&mut Perftest, Failure> {
        self.perftest.as_mut().ok_or_else(|| Failure::usage("--vs-raw over verbs needs a device: give --device"))
    }

    fn memcpy(&mut self, size: u64, src: &[u32]) -> Result<Duration, Failure> {
        let source = match &self.source {
            Some(s) => s.clone(),
            None => {
                let s = Memory::alloc(self.memory.segments())?;
                s.touch()?;
                self.source.insert(s).clone()
            }
        };
        let start = Instant::now();
        for (i, b) in src.iter().enumerate() {
            self.memory.copy_from(&source, (0, u64::from(*b) * size), (0, i as u64 * size), size)?;
        }
        Ok(start.elapsed())
    }

    fn read_process(&mut self, size: u64, src: &[u32]) -> Result<Duration, Failure> {
        let reads: Vec<_> = src.iter().enumerate().map(|(i, b)| (u64::from(*b) * size, i as u64 * size)).collect();
        let start = Instant::now();
        bare::read(self.producer.pid, self.producer.base, &self.memory, size, &reads)?;
        Ok(start.elapsed())
    }

    /// Receives from another process over one loopback connection, with reads and writes of 1 MiB.
    fn stream(&mut self, total: u64) -> Result<Duration, Failure> {
        if self.stream.is_none() {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            let port = listener.local_addr()?.port();
            let child =
                Command::new(args::program()).args(["raw-send", &port.to_string()]).stdin(Stdio::null()).spawn()?;
            self.stream = Some((listener.accept()?.0, child));
        }
        let Some((stream, _)) = &mut self.stream else { return Err(Failure::failed("no connection")) };
        let start = Instant::now();
        stream.write_all(&total.to_le_bytes())?;
        let mut at = 0;
        while at < total {
            let span = Span { segment: 0, offset: at, len: (total - at).min(1 << 20) };
            let n = self.memory.readv(stream.as_fd(), &[span], 0)?;
            if n == 0 {
                return Err(Failure::failed("the bare sender ended"));
            }
            at += n as u64;
        }
        Ok(start.elapsed())
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some((stream, mut child)) = self.stream.take() {
            drop(stream);
            // The closed connection ends the process.
            let _ = child.wait();
        }
    }
}

/// The sender of the loopback connection: reads a number of bytes, sends as many, and repeats until the peer closes.
pub(crate) fn send(port: u16) -> Result<ExitCode, Failure> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    let memory = Memory::anonymous(&[256 << 20])?;
    let ones = vec![1u8; 1 << 20];
    for i in 0..256u64 {
        memory.write_from(0, i << 20, &ones)?;
    }
    let mut request = [0; 8];
    while stream.read_exact(&mut request).is_ok() {
        let total = u64::from_le_bytes(request);
        let mut sent = 0;
        while sent < total {
            let offset = sent % (256 << 20);
            let len = (total - sent).min(1 << 20).min((256 << 20) - offset);
            sent += memory.writev(stream.as_fd(), &[Span { segment: 0, offset, len }], 0)? as u64;
        }
    }
    Ok(ExitCode::SUCCESS)
}
