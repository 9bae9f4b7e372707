//! Hello: the peers' identity, and which engines must not exchange KV.

use std::{
    io::{Read, Write},
    net::TcpListener,
    time::Duration,
};

use kvferry_proto::{Cause, HelloError, Model, hello::Hello};

use super::rig::{Consumer, Rig, config, hello, model, peer_id, run};
use crate::control::call::Caller;

fn say(addr: &str, hello: &Hello) -> HelloError {
    run(Caller::new(config()).hello(addr, hello)).expect_err("a Hello that must fail")
}

#[test]
fn a_mismatch_names_the_field_and_both_values() {
    let rig = Rig::new(&config());
    let other = Model { dtype: "fp8_e4m3".into(), ..model() };
    let error = say(&rig.addr.to_string(), &Hello { model: other, ..hello() });
    let HelloError::Mismatch(m) = &error else { panic!("{error}") };
    assert_eq!((m.field.as_str(), m.consumer.as_str(), m.producer.as_str()), ("dtype", "fp8_e4m3", "bfloat16"));
    assert_eq!(error.cause(), Cause::Refused);
}

#[test]
fn mismatches_of_a_peer_share_a_line_in_the_log() {
    let rig = Rig::new(&config());
    for _ in 0..3 {
        let other = Model { dtype: "fp8_e4m3".into(), ..model() };
        say(&rig.addr.to_string(), &Hello { model: other, ..hello() });
    }
    assert_eq!(rig.server.refusals([127, 0, 0, 1].into(), "mismatch"), Some(2), "the first one is in the log");
}

#[test]
fn a_claim_at_a_peer_of_another_model_is_refused() {
    let rig = Rig::new(&config());
    let me = Hello { model: Model { block_tokens: 32, ..model() }, ..hello() };
    let consumer = Consumer::with(rig.addr, config(), me, std::sync::Arc::new(super::rig::NoLanes));
    let claim = consumer.claim(1, &rig.desk.me);
    assert_eq!(consumer.answer(), (claim, Some(Cause::Refused)));
}

#[test]
fn peers_without_a_common_version_name_both_ranges() {
    let rig = Rig::new(&config());
    let error = say(&rig.addr.to_string(), &Hello { versions: (7, 9), ..hello() });
    let HelloError::Version { here, there } = &error else { panic!("{error}") };
    assert_eq!((here.as_str(), there.as_str()), ("7 to 9", "2 to 2"));
}

#[test]
fn a_closed_port_is_distinguished_from_a_silent_peer() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let mut short = config();
    short.session.hello_timeout = Duration::from_millis(200);
    let silent = run(Caller::new(short).hello(&addr, &hello())).unwrap_err();
    assert!(matches!(silent, HelloError::Unreachable { refused: false, .. }), "{silent}");
    drop(listener);
    let gone = say(&addr, &hello());
    assert!(matches!(gone, HelloError::Unreachable { refused: true, .. }), "{gone}");
}

#[test]
fn a_malformed_address_is_an_error() {
    for addr in ["", "host", "host:", ":1", "host:0", "host:99999", "a b:1", "evil/path?q:80", "[::1", "user@host:1"] {
        let error = say(addr, &hello());
        assert!(matches!(error, HelloError::Unreachable { refused: false, .. }), "{addr:?}: {error}");
    }
}

#[test]
fn a_server_of_another_protocol_is_refused() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let server = std::thread::spawn(move || {
        let (mut io, _) = listener.accept().unwrap();
        let _ =
            io.write_all(b"SSH-2.0-OpenSSH_9.6\r\nthis is not HTTP/2, and it is long enough to be a frame header\r\n");
        // Until the other side hangs up.
        let _ = io.read_to_end(&mut Vec::new());
    });
    let error = say(&addr.to_string(), &hello());
    assert!(matches!(error, HelloError::Protocol { .. } | HelloError::Unreachable { refused: false, .. }), "{error}");
    server.join().unwrap();
}

#[test]
fn an_offer_of_another_engine_at_this_address_is_refused() {
    let rig = Rig::new(&config());
    let consumer = Consumer::new(rig.addr, config());
    let claim = consumer.claim(1, &peer_id("prefill-9"));
    assert_eq!(consumer.answer(), (claim, Some(Cause::Refused)));
}
