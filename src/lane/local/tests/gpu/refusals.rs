//! Lanes that are refused, and malformed replies.

use rustix::fs::{MemfdFlags, SealFlags};

use super::*;
use crate::{
    lane::local::{
        exported::GpuPool,
        wire::{Reply, Request},
    },
    memory::gpu::{GpuError, Handle, Part},
};

fn refused<T: std::fmt::Debug>(lane: Result<T, LaneError>) -> String {
    match lane {
        Err(LaneError::Refused { why }) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn host_and_gpu_memory_share_no_lane() {
    with_driver(host_and_gpu_memory_share_no_lane, "", |_| {
        let p = Producer::start("gpu handles");
        let why = refused(dial(&p.name, 1, p.incarnation, &Memory::alloc(&[4096]).unwrap()));
        assert!(why.contains("is GPU memory") && why.contains("the tcp lane"), "{why}");
        let memory = memory();
        connect(&p.name, 1, p.incarnation, &memory, LONG).expect("the refusal did not use up the lane");
        let p = Producer::start("memfd");
        let why = refused(connect(&p.name, 1, p.incarnation, &memory, LONG).map(drop));
        assert!(why.contains("is host memory"), "{why}");
        assert!(dial(&p.name, 1, p.incarnation, &Memory::alloc(&[4096]).unwrap()).is_ok());
    });
}

#[test]
fn a_pool_that_cannot_be_exported_is_refused_with_the_reason() {
    with_driver(a_pool_that_cannot_be_exported_is_refused_with_the_reason, "ipc=no", |_| {
        let memory = memory();
        let p = Producer::start("gpu handles");
        for lane in [1, 2] {
            let why = refused(connect(&p.name, lane, p.incarnation, &memory, LONG).map(drop));
            assert!(why.contains("cannot share its GPU memory: cuMemRetainAllocationHandle failed"), "{why}");
        }
    });
}

#[test]
fn a_pool_in_too_many_allocations_is_refused_with_the_number() {
    with_driver(a_pool_in_too_many_allocations_is_refused_with_the_number, "", |_| {
        let p = Producer::start("gpu many");
        let why = refused(connect(&p.name, 1, p.incarnation, &memory(), LONG).map(drop));
        assert!(why.contains("253 allocations"), "{why}");
    });
}

#[test]
fn a_lane_to_memory_of_the_same_process_fails_with_the_drivers_reason() {
    with_driver(a_lane_to_memory_of_the_same_process_fails_with_the_drivers_reason, "", |_| {
        let (export, _) = export("gpu handles");
        let incarnation = Incarnation::random();
        let (handle, _until) = background();
        let server = Server::start(export, incarnation, handle, &LocalConfig::default(), &Limits::default()).unwrap();
        server.admit(1, KEY);
        match connect(&server.name(), 1, incarnation, &memory(), LONG).map(drop) {
            Err(e @ LaneError::Gpu { source: GpuError::Call { code: 201, .. }, .. }) => {
                assert!(e.to_string().contains("GPU-"), "{e}");
            }
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn a_pool_that_could_not_be_exported_is_exported_for_the_next_lane() {
    with_driver(a_pool_that_could_not_be_exported_is_exported_for_the_next_lane, "", |control| {
        let (export, _) = export("gpu handles");
        let incarnation = Incarnation::random();
        let (handle, _until) = background();
        let server = Server::start(export, incarnation, handle, &LocalConfig::default(), &Limits::default()).unwrap();
        let memory = memory();
        let lane = |number| {
            server.admit(number, KEY);
            connect(&server.name(), number, incarnation, &memory, LONG).map(drop).unwrap_err()
        };
        const OUT_OF_MEMORY: i32 = 2;
        control.fail_calls(c"cuIpcGetMemHandle", OUT_OF_MEMORY, 0, 1);
        let refused = lane(1);
        assert!(refused.to_string().contains("cuIpcGetMemHandle"), "{refused}");
        // It has the handles now, which a process cannot open itself.
        let refused = lane(2);
        assert!(matches!(refused, LaneError::Gpu { source: GpuError::Call { code: 201, .. }, .. }), "{refused:?}");
    });
}

/// Answers one request on a socket, with these bytes and files. Returns the socket's name.
fn answering(reply: Vec<u8>, files: Vec<OwnedFd>) -> Vec<u8> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let name = format!("kvferry-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let listener = socket::new().unwrap();
    rustix::net::bind(&listener, &SocketAddrUnix::new_abstract_name(name.as_bytes()).unwrap()).unwrap();
    rustix::net::listen(&listener, 1).unwrap();
    std::thread::spawn(move || {
        let wait = |fd: &OwnedFd| poll(&mut [PollFd::new(fd, PollFlags::IN)], None).unwrap();
        wait(&listener);
        let fd = rustix::net::accept(&listener).unwrap();
        wait(&fd);
        let mut request = [0; wire::REQUEST];
        rustix::net::recv(&fd, &mut request[..], RecvFlags::empty()).unwrap();
        assert!(Request::decode(&request).unwrap().gpu.is_some());
        let files: Vec<_> = files.iter().map(OwnedFd::as_fd).collect();
        socket::send(fd.as_fd(), &reply, &files).unwrap();
        // Until the consumer closes.
        wait(&fd);
    });
    [b"\0", name.as_bytes()].concat()
}

fn file(len: u64, seals: SealFlags) -> OwnedFd {
    let fd = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&fd, len).unwrap();
    rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
    fd
}

#[test]
fn malformed_replies_end_in_an_error_and_leave_nothing_mapped() {
    with_driver(malformed_replies_end_in_an_error_and_leave_nothing_mapped, "", |control| {
        let p = Producer::start("gpu handles");
        let memory = memory();
        let incarnation = Incarnation::random();
        let words = || file(64, SealFlags::SHRINK);
        let part = |segment, len, allocation, offset| Part { segment, at: 0, len, allocation, offset };
        let parts = vec![part(0, 6 * MIB, 0, 0), part(1, 3000, 0, 6 * MIB), part(2, 4 * MIB, 0, 8 * MIB)];
        let pool = |handle, parts| GpuPool { uuid: [1; 16], allocations: vec![(handle, 16 * MIB)], parts };
        let encode = |segments, pool: GpuPool| Reply::GrantedGpu { incarnation, slots: 8, segments, pool }.encode();
        let good = |handle| encode(3, pool(handle, parts.clone()));
        let answer = |reply: Vec<u8>, files: Vec<OwnedFd>| {
            connect(&answering(reply, files), 1, incarnation, &memory, LONG).map(drop).unwrap_err()
        };
        let protocol = |reply, files| {
            let e = answer(reply, files);
            assert!(matches!(e, LaneError::Protocol { .. }), "{e:?}");
        };
        let legacy = || good(Handle::Legacy([7; 64]));
        let host = Reply::Granted { incarnation, words: 0, slots: 8, files: false, segments: vec![0; 3] };
        protocol(host.encode(), vec![]);
        protocol(encode(2, pool(Handle::Descriptor, parts[..2].to_vec())), vec![words(), words()]);
        protocol(encode(3, pool(Handle::Descriptor, vec![part(0, 16 * MIB, 0, 1)])), vec![words(), words()]);
        protocol(legacy()[..200].to_vec(), vec![words()]);
        protocol([legacy(), vec![0; wire::MAX_REPLY]].concat(), vec![words()]);
        protocol(legacy(), vec![words(), words()]);
        protocol(legacy(), vec![file(63, SealFlags::SHRINK)]);
        protocol(legacy(), vec![file(64, SealFlags::empty())]);
        let e = answer(good(Handle::Descriptor), vec![words()]);
        assert!(matches!(e, LaneError::Io { .. }) && e.to_string().contains("limit of open files"), "{e}");
        let other = Reply::GrantedGpu {
            incarnation: p.incarnation,
            slots: 8,
            segments: 3,
            pool: pool(Handle::Legacy([7; 64]), parts.clone()),
        };
        assert!(matches!(answer(other.encode(), vec![words()]), LaneError::Restarted));
        // What only the driver can tell.
        let driver = |reply, files| {
            let e = answer(reply, files);
            assert!(matches!(e, LaneError::Gpu { .. }), "{e:?}");
        };
        driver(legacy(), vec![words()]);
        driver(good(Handle::Descriptor), vec![words(), words()]);
        driver(encode(3, pool(Handle::Descriptor, parts[..2].to_vec())), vec![words(), words()]);
        gpu(&memory).memory().unwrap();
        assert_eq!(control.counts().imports, 0);
        assert_eq!(control.counts().reservations, 2, "this process's own memory");
    });
}

/// The handles that a producer gives to a consumer.
fn handles_of(p: &Producer) -> GpuPool {
    let fd = socket::new().unwrap();
    let name = SocketAddrUnix::new_abstract_name(&p.name[1..]).unwrap();
    rustix::net::connect(&fd, &name).unwrap();
    let request = Request { lane: 1, incarnation: p.incarnation.get(), key: KEY, gpu: Some([1; 16]) };
    socket::send(fd.as_fd(), &request.encode(), &[]).unwrap();
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], None).unwrap();
    let mut bytes = vec![0; wire::MAX_REPLY];
    let len = socket::receive(fd.as_fd(), &mut bytes).unwrap().len;
    match Reply::decode(&bytes[..len]).unwrap() {
        Reply::GrantedGpu { pool, .. } => pool,
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_allocation_is_as_long_as_the_driver_says_however_often_its_handle_comes() {
    let test = an_allocation_is_as_long_as_the_driver_says_however_often_its_handle_comes;
    with_driver(test, "", |control| {
        let p = Producer::start("gpu handles");
        let memory = memory();
        let incarnation = Incarnation::random();
        let mut pool = handles_of(&p);
        let (handle, size) = pool.allocations[0].clone();
        assert!(matches!(handle, Handle::Legacy(_)));
        // The second time the handle is known, and its owner claims more than there is.
        let second = pool.allocations.len() as u32;
        pool.allocations.push((handle, u64::MAX));
        for offset in [size, u64::MAX - 6 * MIB, size - MIB] {
            let mut pool = pool.clone();
            (pool.parts[0].allocation, pool.parts[0].offset) = (second, offset);
            let segments = 1 + u32::from(pool.parts.iter().map(|p| p.segment).max().unwrap());
            let reply = Reply::GrantedGpu { incarnation, slots: 8, segments, pool }.encode();
            let name = answering(reply, vec![file(64, SealFlags::SHRINK)]);
            let e = connect(&name, 1, incarnation, &memory, LONG).map(drop).unwrap_err();
            assert!(matches!(e, LaneError::Gpu { .. } | LaneError::Protocol { .. }), "{e:?}");
        }
        gpu(&memory).memory().unwrap();
        assert_eq!(control.counts().imports, 0);
    });
}
