//! Whether packs hold what they should.
use super::objects::{Single, content, read_each, singles};
use crate::{
    blocking::blocking,
    coordinator::receipts::{
        packs::{Pack, each},
        store::{FOLDER_STEPS, Receipts},
    },
    error::{Error, Result},
    storage::Location,
};
use bytes::Bytes;
use futures::TryStreamExt;
use std::collections::HashMap;
use superbatch_proto::v1::Reason;

/// The hash of each receipt's own file, by step.
type Hashes = HashMap<u64, [u8; 32]>;

/// Checks that a pack has the receipts of these contents, and no others.
pub(super) fn check(pack: &Bytes, first: u64, contents: &[blake3::Hash]) -> Result<()> {
    let (mut expected, mut is_same) = ((first..).zip(contents), true);
    each(pack, |_, step, receipt| {
        let same = |(at, known): (u64, &blake3::Hash)| at == step && *known == content(&receipt);
        is_same &= expected.next().is_some_and(same);
    })?;
    if is_same && expected.next().is_none() {
        return Ok(());
    }
    let message = format!("receipts from step {first} on came out of their pack as others");
    Err(Error::internal(message))
}

/// Reads a pack whole, and returns the hash of each receipt's own file, by step; if it is damaged,
/// what is wrong with it.
///
/// # Errors
/// `StorageUnreachable`.
pub(super) async fn hashes(run: &Location, pack: &Pack) -> Result<Result<Hashes, String>> {
    match verified(run, pack).await {
        Ok(hashes) => Ok(Ok(hashes)),
        Err(error) if error.reason() == Reason::Internal => Ok(Err(error.chain())),
        Err(error) => Err(error),
    }
}

async fn verified(run: &Location, pack: &Pack) -> Result<Hashes> {
    let (key, digest) = (pack.key(), pack.digest.clone());
    let named = |error: Error| error.about(run.uri_of(&key)).with("file", &key);
    let bytes = run.get_large(&key).await?;
    let (first, count) = (pack.first, pack.count());
    let hashes = blocking("reading a pack of receipts", move || {
        if blake3::hash(&bytes).to_hex().as_str() != digest {
            return Err(Error::internal(
                "this pack of receipts is damaged: its bytes do not have the digest in its name",
            ));
        }
        let mut hashes = HashMap::new();
        each(&bytes, |hash, step, _| {
            hashes.insert(step, hash);
        })?;
        if (first..first + count).any(|step| !hashes.contains_key(&step)) {
            return Err(Error::internal("this pack lacks receipts of its steps"));
        }
        Ok(hashes)
    });
    hashes.await.map_err(named)
}

/// Divides receipts that are both in a pack and in objects of their own into those of which both
/// say the same, and problems of the others.
///
/// # Errors
/// `StorageUnreachable`.
pub(super) async fn compared(
    run: &Location,
    pack: &Pack,
    hashes: &Hashes,
    beside: &[Single],
) -> Result<(Vec<Single>, Vec<String>)> {
    let (mut same, mut others) = (Vec::new(), Vec::new());
    let mut files = read_each(run, beside);
    while let Some((single, bytes)) = files.try_next().await? {
        let hash = bytes.map(|bytes| *blake3::hash(&bytes).as_bytes());
        match hash {
            None => {}
            Some(hash) if hashes.get(&single.step) == Some(&hash) => same.push(single),
            Some(_) => others.push(differs(run, pack, &single)),
        }
    }
    Ok((same, others))
}

/// Returns the problem of a receipt whose object differs from what its pack has.
fn differs(run: &Location, pack: &Pack, single: &Single) -> String {
    format!(
        "{} is not what {} has of step {}, which is in force; if it is of no use to you, delete it",
        run.uri_of(&single.key()),
        pack.key(),
        single.step
    )
}

/// Returns what is wrong with the packs of a run: damage, and objects of receipts that differ from
/// what packs have of them. With it goes how many receipts each pack has.
///
/// # Errors
/// `StorageUnreachable`.
pub async fn problems(receipts: &Receipts) -> Result<(Vec<u64>, Vec<String>)> {
    let (run, mut counts, mut found) = (receipts.run(), Vec::new(), Vec::new());
    for pack in receipts.packs().look().await?.all() {
        counts.push(pack.count());
        let hashes = match hashes(run, pack).await? {
            Ok(hashes) => hashes,
            Err(damage) => {
                found.push(damage);
                continue;
            }
        };
        for number in pack.first / FOLDER_STEPS..=pack.last / FOLDER_STEPS {
            let mut beside = singles(run, number).await?;
            beside.retain(|single| pack.holds(single.step, single.generation));
            found.extend(compared(run, pack, &hashes, &beside).await?.1);
        }
    }
    Ok((counts, found))
}
