//! The messages and services that `build.rs` compiles from `proto/kvferry/v1`.
#![allow(missing_docs, unreachable_pub, clippy::all, unused_qualifications, rustdoc::all)]

tonic::include_proto!("kvferry.v1");

/// The compiled descriptors, for the reflection service.
pub(crate) const DESCRIPTORS: &[u8] = tonic::include_file_descriptor_set!("kvferry.v1");
