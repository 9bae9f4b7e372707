//! libibverbs, opened at run time: one binary starts on every host, and names missing libraries and functions.
//!
//! Owns the table of its functions. The published `ibverbs` crate has no READ, cannot register foreign memory and keeps its
//! handles private, so only the types of its FFI layer are used, and nothing is linked. Functions of the data path
//! (`post_send`, `poll_cq`, `req_notify_cq`) are not in this table but in each context's own.

use std::{
    ffi::{c_char, c_int, c_uint, c_void},
    sync::OnceLock,
};

use ibverbs_sys::{
    ibv_async_event, ibv_comp_channel, ibv_context, ibv_cq, ibv_device, ibv_device_attr, ibv_gid_entry, ibv_mr, ibv_pd,
    ibv_port_attr, ibv_qp, ibv_qp_attr, ibv_qp_init_attr,
};

use super::error::VerbsError;

macro_rules! functions {
    (needed { $($need:ident: fn($($n:ty),*) -> $nr:ty;)* } wanted { $($want:ident $symbol:literal: fn($($w:ty),*) -> $wr:ty;)* }) => {
        /// The functions, by their names without `ibv_`. The C headers define the valid pointers.
        #[derive(Clone, Copy)]
        #[allow(missing_docs)]
        pub(crate) struct Library {
            $(pub $need: unsafe extern "C" fn($($n),*) -> $nr,)*
            $(pub $want: Option<unsafe extern "C" fn($($w),*) -> $wr>,)*
        }

        impl Library {
            /// The error is a missing function's name.
            fn load(lib: &libloading::Library) -> Result<Self, &'static str> {
                Ok(Self {
                    $($need: {
                        let name = concat!("ibv_", stringify!($need));
                        // SAFETY: the symbol's type is the one that the C headers declare for this name; the library is
                        // never closed (see `get`), so the pointer stays valid.
                        let found = unsafe { lib.get(name.as_bytes()) };
                        *found.map_err(|_| name)?
                    },)*
                    $($want: {
                        // SAFETY: the symbol's type is the one that the C headers declare for this name; the library is
                        // never closed.
                        let found = unsafe { lib.get($symbol.as_bytes()) };
                        found.ok().map(|f| *f)
                    },)*
                })
            }
        }
    };
}

functions! {
    needed {
        get_device_list: fn(*mut c_int) -> *mut *mut ibv_device;
        free_device_list: fn(*mut *mut ibv_device) -> ();
        get_device_name: fn(*mut ibv_device) -> *const c_char;
        open_device: fn(*mut ibv_device) -> *mut ibv_context;
        close_device: fn(*mut ibv_context) -> c_int;
        query_device: fn(*mut ibv_context, *mut ibv_device_attr) -> c_int;
        query_port: fn(*mut ibv_context, u8, *mut ibv_port_attr) -> c_int;
        alloc_pd: fn(*mut ibv_context) -> *mut ibv_pd;
        dealloc_pd: fn(*mut ibv_pd) -> c_int;
        reg_mr: fn(*mut ibv_pd, *mut c_void, usize, c_int) -> *mut ibv_mr;
        dereg_mr: fn(*mut ibv_mr) -> c_int;
        create_comp_channel: fn(*mut ibv_context) -> *mut ibv_comp_channel;
        destroy_comp_channel: fn(*mut ibv_comp_channel) -> c_int;
        create_cq: fn(*mut ibv_context, c_int, *mut c_void, *mut ibv_comp_channel, c_int) -> *mut ibv_cq;
        destroy_cq: fn(*mut ibv_cq) -> c_int;
        get_cq_event: fn(*mut ibv_comp_channel, *mut *mut ibv_cq, *mut *mut c_void) -> c_int;
        ack_cq_events: fn(*mut ibv_cq, c_uint) -> ();
        create_qp: fn(*mut ibv_pd, *mut ibv_qp_init_attr) -> *mut ibv_qp;
        modify_qp: fn(*mut ibv_qp, *mut ibv_qp_attr, c_int) -> c_int;
        destroy_qp: fn(*mut ibv_qp) -> c_int;
        get_async_event: fn(*mut ibv_context, *mut ibv_async_event) -> c_int;
        ack_async_event: fn(*mut ibv_async_event) -> ();
    }
    wanted {
        reg_mr_iova2 "ibv_reg_mr_iova2": fn(*mut ibv_pd, *mut c_void, usize, u64, c_uint) -> *mut ibv_mr;
        reg_dmabuf_mr "ibv_reg_dmabuf_mr": fn(*mut ibv_pd, u64, usize, u64, c_int, c_int) -> *mut ibv_mr;
        fork_init "ibv_fork_init": fn() -> c_int;
        query_gid_table "_ibv_query_gid_table": fn(*mut ibv_context, *mut ibv_gid_entry, usize, u32, usize) -> isize;
    }
}

/// The missing part.
enum Missing {
    /// The library; with the loader's message.
    All(String),
    /// A function.
    Function(&'static str),
}

impl Library {
    /// This host's libibverbs, opened once and never closed: provider threads and handlers may outlive any owner.
    pub(crate) fn get() -> Result<&'static Self, VerbsError> {
        static LOADED: OnceLock<Result<Library, Missing>> = OnceLock::new();
        let loaded = LOADED.get_or_init(|| {
            // SAFETY: libibverbs has no initialiser of its own that could interfere; it is a system library like libc.
            let lib = unsafe { libloading::Library::new("libibverbs.so.1") };
            let lib = lib.map_err(|e| Missing::All(e.to_string()))?;
            let table = Self::load(&lib).map_err(Missing::Function);
            std::mem::forget(lib);
            if let Ok(table) = &table {
                table.survive_forks();
            }
            table
        });
        loaded.as_ref().map_err(|missing| match missing {
            Missing::All(why) => VerbsError::NoLibrary { why: why.clone() },
            Missing::Function(symbol) => VerbsError::OldLibrary { symbol },
        })
    }
}

impl Library {
    /// Called before any registration. Linux before 5.12 does not copy pinned pages for the child of a fork. The parent's next
    /// write to such a page gets a copy, the device keeps writing to the old page, and arriving blocks are never seen. There
    /// libibverbs keeps registered pages out of children. On newer kernels this has no effect.
    fn survive_forks(&self) {
        let Some(init) = self.fork_init else { return };
        // SAFETY: it has no arguments, and may be called more than once, at any time before a registration.
        let rc = unsafe { init() };
        if rc != 0 {
            // Another user of the library registered memory first.
            let error = std::io::Error::from_raw_os_error(rc);
            tracing::warn!(%error, "ibv_fork_init failed: on Linux before 5.12 this process must not fork while verbs are used");
        }
    }
}

impl std::fmt::Debug for Library {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("libibverbs")
    }
}
