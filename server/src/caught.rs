//! Panics of the Parquet reader, as errors. It takes damaged pages of some kinds for its own
//! mistake, and no check beforehand is simpler than to read them.
use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
};

/// Runs a read of a file that others made. All that it changes must be dropped with its error.
///
/// # Errors
/// Those of `read`, and `broken` with what a panic said: the file is at fault, and the service is
/// not.
pub(crate) fn caught<T, E>(
    broken: impl FnOnce(String) -> E,
    read: impl FnOnce() -> Result<T, E>,
) -> Result<T, E> {
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|panic| Err(broken(said(&*panic))))
}

fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    format!(
        "the Parquet reader failed on it: {}",
        text.unwrap_or("no message")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_with_what_it_said() {
        let read = |n: usize| caught(|said| said, move || Ok([1, 2][n]));
        assert_eq!(read(1), Ok(2));
        let said = read(2).unwrap_err();
        assert!(
            said.starts_with("the Parquet reader failed on it: index out of bounds"),
            "{said}"
        );
        assert_eq!(
            caught(|said| said, || Err::<(), _>("own".to_owned())),
            Err("own".to_owned())
        );
    }
}
