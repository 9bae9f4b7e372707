//! Measures the TCP rate of a wire.

use std::{
    error::Error,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    time::{Duration, Instant},
};

use kvferry_testkit::wire::{Direction, Wire};

fn main() -> Result<(), Box<dyn Error>> {
    let wire = Wire::new(0)?;
    let listener = wire.at_far(|| TcpListener::bind((wire.far(), 0)))?;
    let mut near = TcpStream::connect(listener.local_addr()?)?;
    let (mut far, _) = listener.accept()?;
    std::thread::spawn(move || {
        let data = vec![0; 1 << 20];
        while near.write_all(&data).is_ok() {}
    });
    let mut buffer = vec![0; 1 << 20];
    let (mut bytes, start) = (0, Instant::now());
    while start.elapsed() < Duration::from_secs(3) {
        bytes += far.read(&mut buffer)?;
    }
    let seconds = start.elapsed().as_secs_f64();
    let packets = [Direction::ToFar, Direction::ToNear].map(|d| wire.counts(d).seen as f64 / seconds);
    println!(
        "{:.0} MB/s, {:.0} packets/s to the far end, {:.0} back",
        bytes as f64 / seconds / 1e6,
        packets[0],
        packets[1]
    );
    Ok(())
}
