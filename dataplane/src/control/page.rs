//! Pages of secret memory with keys, as keyd sent them. Where a successor is to have them they stay as they are, stored with
//! rot, until the volume's key is to go: then they are wiped, for rot's descriptor of them too.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::fd::OwnedFd;
use std::sync::Arc;

use bulkhead_crypto::xts::KEY_BYTES;
use bulkhead_crypto::{SecretArena, SecretMemory, XtsKey};

use crate::stored::Fd;

/// A page that is wiped when this drops, whoever else has it.
#[derive(Debug)]
pub(super) struct Page(Option<Fd>);

impl Page {
    /// Takes over the wiping of a page, which is not mapped here.
    pub(super) fn new(page: Fd) -> Self {
        Self(Some(page))
    }

    /// Its descriptor, to be stored.
    pub(super) fn fd(&self) -> Option<Fd> {
        self.0.clone()
    }

    /// Leaves it as it is, for a successor that is served by it already.
    pub(super) fn leave(mut self) {
        self.0 = None;
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        let Some(page) = self.0.take() else {
            return;
        };
        let owned = Arc::try_unwrap(page).or_else(|page| page.try_clone());
        let wiped = owned.and_then(|page| SecretMemory::from_fd(page, KEY_BYTES));
        if let Err(error) = wiped {
            tracing::error!("the page of a key that is to go can't be wiped: {error}");
        }
    }
}

/// The pages of a volume; none of a plain one, or where nothing is stored.
#[derive(Debug, Default)]
pub(super) struct Pages {
    /// Of its key.
    pub(super) key: Option<Page>,
    /// Of the key that a re-key replaces.
    pub(super) previous: Option<Page>,
}

impl Pages {
    /// Leaves both as they are.
    pub(super) fn leave(&mut self) {
        let pages = [self.key.take(), self.previous.take()];
        pages.into_iter().flatten().for_each(Page::leave);
    }
}

/// Expands the key of a page. The page is wiped, also if it is wrong, unless it is to be kept: then it comes
/// back.
///
/// # Errors
/// What is wrong with the descriptor or the key.
pub(super) fn expand(
    arena: &Arc<SecretArena>,
    page: OwnedFd,
    keep: bool,
) -> Result<(XtsKey, Option<Page>), String> {
    // Wiped when it drops, here and for whoever else maps it.
    let page = SecretMemory::from_fd(page, KEY_BYTES).map_err(|e| format!("its key: {e}"))?;
    let bytes = page.as_bytes().as_array();
    let key = XtsKey::new(arena, bytes.ok_or("its key has another length")?);
    let key = key.map_err(|e| e.to_string())?;
    let kept = keep.then(|| Page::new(Arc::new(page.into_fd())));
    Ok((key, kept))
}

/// As [`expand`], of a page that is stored already.
///
/// # Errors
/// What is wrong with the descriptor or the key; the page is wiped.
pub(super) fn expand_stored(arena: &Arc<SecretArena>, page: &Fd) -> Result<(XtsKey, Page), String> {
    let ours = Page::new(Arc::clone(page));
    let copy = page.try_clone().map_err(|e| format!("its key: {e}"))?;
    let (key, copy) = expand(arena, copy, true)?;
    copy.into_iter().for_each(Page::leave);
    Ok((key, ours))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> SecretMemory {
        let mut page = SecretMemory::new(KEY_BYTES).expect("secret memory");
        for (at, byte) in page.as_mut_bytes().iter_mut().enumerate() {
            *byte = u8::try_from(at).expect("64 of them").wrapping_mul(73);
        }
        page
    }

    fn is_wiped(page: &SecretMemory) -> bool {
        page.as_bytes().iter().all(|byte| *byte == 0)
    }

    fn copy(page: &SecretMemory) -> OwnedFd {
        use std::os::fd::AsFd;
        page.as_fd().try_clone_to_owned().expect("duplicated")
    }

    #[test]
    fn a_page_that_is_kept_lasts_until_the_key_is_to_go() {
        let arena = SecretArena::new(4).expect("arena");
        let keyds = page();
        let (first, kept) = expand(&arena, copy(&keyds), true).expect("a key");
        let kept = kept.expect("it is kept");
        assert!(!is_wiped(&keyds));
        let stored = kept.fd().expect("there is one");
        let (second, again) = expand_stored(&arena, &stored).expect("the same key");
        assert!(first.is_same(&second) && !is_wiped(&keyds));
        kept.leave();
        assert!(!is_wiped(&keyds), "left for a successor");
        drop(again);
        assert!(is_wiped(&keyds), "the key is to go");
    }

    #[test]
    fn a_page_that_is_not_kept_or_wrong_is_wiped_at_once() {
        let arena = SecretArena::new(4).expect("arena");
        let keyds = page();
        let (_, kept) = expand(&arena, copy(&keyds), false).expect("a key");
        assert!(kept.is_none() && is_wiped(&keyds));
        let mut halves = page();
        halves.as_mut_bytes().fill(7);
        let stored: Fd = Arc::new(copy(&halves));
        assert!(expand_stored(&arena, &stored).is_err(), "equal halves");
        assert!(is_wiped(&halves));
    }
}
