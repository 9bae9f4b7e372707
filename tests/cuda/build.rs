//! Names the library `libcuda.so` inside, so that a later `dlopen("libcuda.so")` of the same process returns it. The
//! file keeps another name: cargo puts its folder in LD_LIBRARY_PATH, and a machine with a GPU must find the real
//! driver.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so");
}
