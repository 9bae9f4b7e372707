//! The `kvferry` command.
fn main() {}
