//! Who runs a command, for the audit log.
use std::{ffi::CStr, mem::MaybeUninit, ptr::null_mut};

/// Room for the texts of one entry of the machine's list of users.
const ENTRY_BYTES: usize = 16 << 10;

/// Returns the name of the machine's user who runs this process; `uid N` of one without a name, as
/// in containers.
pub(super) fn user() -> String {
    // SAFETY: it reads no memory of this process, and cannot fail.
    let uid = unsafe { libc::getuid() };
    name_of(uid).unwrap_or_else(|| format!("uid {uid}"))
}

fn name_of(uid: libc::uid_t) -> Option<String> {
    let mut entry = MaybeUninit::<libc::passwd>::uninit();
    let mut texts: Vec<libc::c_char> = vec![0; ENTRY_BYTES];
    let mut found = null_mut();
    // SAFETY: all pointers are valid for writes, `texts` for its whole length.
    let status = unsafe {
        libc::getpwuid_r(
            uid,
            entry.as_mut_ptr(),
            texts.as_mut_ptr(),
            texts.len(),
            &raw mut found,
        )
    };
    if status != 0 || found.is_null() {
        return None;
    }
    // SAFETY: `found` points to `entry`, which is filled in; its name is a C string in `texts`.
    let name = unsafe { CStr::from_ptr((*found).pw_name) };
    name.to_str().ok().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_named_if_they_have_a_name() {
        assert_eq!(name_of(0).as_deref(), Some("root"));
        assert_eq!(name_of(libc::uid_t::MAX - 7), None);
        assert!(!user().is_empty());
    }
}
