//! What the service itself wrote and reads again, and what its operator writes.
use super::{Input, opened, put, read, read_own, stores, wait};
use crate::{
    access::{scope::Scope, tokens::Tokens},
    config::Config,
    coordinator::{
        facts::{incarnations::Incarnations, run},
        losses::Losses,
        receipts::{
            json,
            packs::{Pack, each},
            page::page,
            parquet,
            store::Receipts,
        },
        weights::{Fact, inherit::Inheritance},
    },
};
use bytes::Bytes;
use prost::Message;
use std::time::SystemTime;
use superbatch_proto::reflect;

/// A receipt's file: what is read of it can be written, and is then the same.
pub fn receipt(bytes: &[u8]) {
    let file = Bytes::copy_from_slice(bytes);
    let end = file.slice(file.len() / 2..);
    parquet::decode_summary(&end, file.len() as u64);
    let Some(receipt) = read_own(parquet::decode(file)) else {
        return;
    };
    json::receipt(&receipt);
    let written = parquet::encode(&receipt).expect("a receipt that was read can be written");
    let again = parquet::decode(written.clone()).expect("it was written just now");
    // Compared as they are written: numbers that are none are equal to nothing.
    let twice = parquet::encode(&again).expect("it was read just now");
    assert!(written == twice, "a receipt differs from its own file");
    read(page(receipt, 0, 0));
}

/// After a byte with its first step and one with the number of further ones: a pack. A receipt that
/// is found by its step is one of those that the whole file has.
pub fn pack(bytes: &[u8]) {
    let mut input = Input(bytes);
    let first = u64::from(input.byte());
    let last = first + u64::from(input.byte() % 4);
    let file = Bytes::copy_from_slice(input.0);
    let pack = Pack {
        first,
        last,
        generation: 0,
        digest: blake3::hash(&file).to_hex().to_string(),
        bytes: file.len() as u64,
    };
    // Compared as they are written: numbers that are none are equal to nothing.
    let mut all = Vec::new();
    let whole = each(&file, |_, step, receipt| {
        all.push((step, receipt.encode_to_vec()))
    });
    let is_whole = read_own(whole).is_some();
    let stores = stores();
    let at = opened(&stores, "memory:///state/runs/r");
    wait(async {
        put(&at, &pack.key(), input.0).await;
        let receipts = Receipts::new(at);
        let packs = receipts.packs().look().await;
        assert_eq!(packs.expect("memory lists objects").all(), [pack]);
        for step in first..=last {
            read_own(receipts.summary(step, 0).await);
            let Some(found) = read_own(receipts.find(step, 0).await).flatten() else {
                continue;
            };
            let is_same =
                |(at, known): &(u64, Vec<u8>)| *at == step && *known == found.encode_to_vec();
            assert!(!is_whole || all.iter().any(is_same), "step {step} differs");
        }
    });
}

/// After a byte that says which: one of the objects of a run's state. The others are whole.
pub fn facts(bytes: &[u8]) {
    const RUN: &str = "run.json";
    const KEYS: [&str; 9] = [
        RUN,
        "phases/0.json",
        "generations/1.json",
        "closed.json",
        "failed.json",
        "incarnations/0.json",
        "losses/000000000000.bin",
        "loss-summaries/000000000001.bin",
        "pushes/0/1.json",
    ];
    let mut input = Input(bytes);
    let key = KEYS[usize::from(input.byte()) % KEYS.len()];
    let stores = stores();
    let at = opened(&stores, "memory:///state/runs/r");
    wait(async {
        if key != RUN {
            let fact = run::RunFact::new(&Default::default(), String::new(), None, None, None);
            let fact = run::create_run(&at, fact).await;
            fact.expect("memory takes an object");
        }
        put(&at, key, input.0).await;
        if let Some(facts) = read_own(run::load(&at).await).flatten() {
            check_chain(&facts);
            let spec = reflect::to_json(&facts.spec);
            reflect::from_json::<superbatch_proto::v1::RunSpec>(spec).expect("as it was written");
            if let Some(fork) = &facts.run.fork {
                read_own(Inheritance::from_value(&fork.weights));
            }
        }
        read_own(Incarnations::load(&at).await);
        read_own(Losses::new(at.clone()).of(vec![(0, 0, 1)]).await);
        if let Some(fact) = read_own(Fact::parse(input.0, key)) {
            fact.published(&at, &fact.snapshot_key());
        }
    });
}

fn check_chain(facts: &run::RunFacts) {
    let newest = facts.chain.current();
    for began in facts.chain.began() {
        for step in [0, began.step.saturating_sub(1), began.step, u64::MAX] {
            let found = facts.chain.candidates(step, began.generation);
            assert_eq!(found.first(), Some(&began.generation));
            assert!(found.iter().all(|generation| *generation <= newest));
        }
        facts.chain.kept_of(began.generation);
    }
}

/// Variables of the environment, a line each, and after a zero byte the file of settings. What it
/// gives comes back from what `superbatch check-config` prints.
pub fn config(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let (variables, yaml) = text.split_once('\0').unwrap_or(("", &*text));
    let environment = || {
        let pairs = variables.lines().filter_map(|line| line.split_once('='));
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned()))
    };
    let Some(config) = read(Config::of(yaml, environment())) else {
        return;
    };
    let printed = serde_yaml_ng::to_string(&config).expect("plain data encodes");
    let again = Config::of(&printed, environment());
    let again = again.unwrap_or_else(|e| panic!("{}: {printed}", e.chain()));
    assert!(again == config, "settings differ from what is printed");
}

/// A file of tokens.
pub fn tokens(bytes: &[u8]) {
    let Some(tokens) = read(Tokens::parse(&String::from_utf8_lossy(bytes))) else {
        return;
    };
    assert!(tokens.find("sbt_0").is_none(), "a hash cannot be made");
    for entry in &tokens.tokens {
        entry.is_for("a.run-of_letters");
        entry.may(Scope::Push);
        entry.is_expired(SystemTime::UNIX_EPOCH);
    }
    let written = serde_yaml_ng::to_string(&tokens).expect("plain data encodes");
    let again = Tokens::parse(&written).unwrap_or_else(|e| panic!("{}: {written}", e.chain()));
    assert!(again == tokens, "tokens differ from their own file");
}
