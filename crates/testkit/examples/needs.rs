//! Checks whether tests with special requirements can run here: exits with 0, or prints the missing requirement and exits
//! with 1.
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
        Some(missing) => {
            println!("{missing}");
            ExitCode::FAILURE
        }
    }
}
