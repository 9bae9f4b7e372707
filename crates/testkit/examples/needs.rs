//! Says whether tests with special needs can run here: exits 0, or prints what is missing and exits 1.
//!
//!     cargo run -q -p kvferry-testkit --example needs wire

use std::process::ExitCode;

use kvferry_testkit::wire::Wire;

fn main() -> ExitCode {
    let missing = match std::env::args().nth(1).as_deref() {
        Some("wire") => Wire::new(0).err(),
        _ => {
            eprintln!("usage: needs wire");
            return ExitCode::from(2);
        }
    };
    match missing {
        None => ExitCode::SUCCESS,
        Some(why) => {
            println!("{why}");
            ExitCode::FAILURE
        }
    }
}
