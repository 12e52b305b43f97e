//! The owner of a run: `owner/{epoch}.json`, by conditional create. Two coordinators that claim the
//! same epoch create the same key, and object storage lets one of them win.
use crate::{
    error::{Error, Result},
    storage::{Created, Location, nonce},
};
use serde::{Deserialize, Serialize};
use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};
use superbatch_proto::{
    INSTANCE, OWNER,
    v1::{Reason, selection_service_server::SERVICE_NAME},
};
use superbatch_transport::Dialer;
use tokio::time::timeout;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

/// How long a former owner may take to answer before it counts as dead. Short, since trainers wait
/// for the takeover; a live coordinator answers its health check in milliseconds.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// For so long after a check a process may take it that it is the owner still.
const KNOWN_FOR: Duration = Duration::from_secs(5);

/// How long [`Ownership::check_lately`] waits for the store.
const LOOKS_FOR: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Serialize, Deserialize)]
struct OwnerFact {
    address: String,
    /// Id of the coordinator process.
    instance: String,
    /// Whether its build reads packed receipts. Older builds do not, and do not say so.
    #[serde(default)]
    reads_packs: bool,
    nonce: String,
}

impl OwnerFact {
    fn unknown() -> Self {
        Self {
            address: "unknown".to_owned(),
            instance: String::new(),
            reads_packs: false,
            nonce: String::new(),
        }
    }

    fn of(identity: &Identity) -> Self {
        Self {
            address: identity.address.clone(),
            instance: identity.instance.clone(),
            reads_packs: true,
            nonce: nonce(),
        }
    }
}

/// This process as an owner of runs.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The address for trainers: http://host:port.
    pub address: String,
    /// Id of the process, new at every start.
    pub instance: String,
    /// Connects to other coordinators.
    pub dialer: Dialer,
}

/// Ownership of one run, since one epoch.
#[derive(Debug, Clone)]
pub struct Ownership {
    run: Location,
    epoch: u64,
    /// When this process last looked whether it is the owner still, or was found to be.
    looked: Arc<tokio::sync::Mutex<Instant>>,
}

impl Ownership {
    fn since(run: &Location, epoch: u64) -> Self {
        Self {
            run: run.clone(),
            epoch,
            looked: Arc::new(tokio::sync::Mutex::new(Instant::now())),
        }
    }

    /// Takes the run over, unless another coordinator owns it and answers.
    ///
    /// # Errors
    /// `NotOwner` with the owner's address.
    pub async fn claim(run: &Location, identity: &Identity) -> Result<Self> {
        loop {
            let epoch = last_epoch(run, identity).await? + 1;
            let fact = OwnerFact::of(identity);
            let bytes = serde_json::to_vec(&fact).expect("plain data encodes");
            // If another coordinator wins this epoch, the loop reads again, and asks the winner
            // whether it is alive.
            if run.create(&key(epoch), bytes.into()).await? == Created::Ours {
                return Ok(Self::since(run, epoch));
            }
        }
    }

    /// Checks that no other coordinator owns the run at `run` and answers. Takes nothing over.
    ///
    /// # Errors
    /// `NotOwner` with the owner's address.
    pub async fn check_free(run: &Location, identity: &Identity) -> Result<()> {
        last_epoch(run, identity).await.map(drop)
    }

    /// Returns when this process became the owner, by the store's clock; `None` if the store does
    /// not say.
    pub async fn claimed_at(&self) -> Option<SystemTime> {
        let fact = self.run.head(&key(self.epoch)).await.ok().flatten();
        fact.map(|fact| fact.last_modified.into())
    }

    /// Checks that no other coordinator has taken the run over.
    ///
    /// # Errors
    /// `NotOwner` with the new owner's address.
    pub async fn check(&self) -> Result<()> {
        // One GET of the next epoch's key, since each commit makes this check: a list of all epochs
        // would cost several times as much. The answer may be stale by the time it is used. It need
        // not be exact: what decides is the conditional create of the receipt. The check only stops
        // a former owner from working on.
        let asked = Instant::now();
        match self.run.find(&key(self.epoch + 1)).await? {
            None => {
                // If a call is looking just now, it notes the time itself.
                if let Ok(mut looked) = self.looked.try_lock() {
                    *looked = asked.max(*looked);
                }
                Ok(())
            }
            Some(_) => {
                let owner = newest(&self.run).await?.map(|(_, owner)| owner);
                Err(not_owner(&owner.unwrap_or_else(OwnerFact::unknown)))
            }
        }
    }

    /// As [`Ownership::check`], for calls that are answered from memory: reads the store only if
    /// the last check was a while ago. A process that was paused for longer than a takeover takes
    /// must not go on with a trajectory that may be over. While a run commits, its commits check.
    ///
    /// A store that does not answer at once is no refusal: what is ready is served on while it is
    /// away, and nothing becomes durable without [`Ownership::check`].
    ///
    /// # Errors
    /// `NotOwner` with the new owner's address.
    pub async fn check_lately(&self) -> Result<()> {
        // One call looks, and those that come meanwhile wait for it.
        let mut looked = self.looked.lock().await;
        if looked.elapsed() < KNOWN_FOR {
            return Ok(());
        }
        let found = timeout(LOOKS_FOR, self.check()).await;
        if let Ok(Err(error)) = found
            && error.reason() == Reason::NotOwner
        {
            return Err(error);
        }
        // Noted whatever came of it: while the store is away, a call waits now and then, not each.
        *looked = Instant::now();
        Ok(())
    }
}

/// Checks that no coordinator of an older build owns the run at `run` and answers: one that knows
/// no packed receipts would take packed steps for steps that nobody has decided.
///
/// # Errors
/// `Unimplemented`, naming the coordinator.
pub async fn check_reads_packs(run: &Location, identity: &Identity) -> Result<()> {
    silent_older(run, identity).await.map(drop)
}

/// As [`check_reads_packs`]. If such a coordinator was the last owner and does not answer, the run
/// is taken from it: should it only hang, it learns so before its next commit.
///
/// # Errors
/// As [`check_reads_packs`].
pub async fn keep_out_older(run: &Location, identity: &Identity) -> Result<()> {
    while let Some(epoch) = silent_older(run, identity).await? {
        let fact = OwnerFact::of(identity);
        let bytes = serde_json::to_vec(&fact).expect("plain data encodes");
        // If a coordinator is first, it is looked at in its turn.
        run.create(&key(epoch + 1), bytes.into()).await?;
    }
    Ok(())
}

/// Returns the newest epoch of a run if its owner is of an older build and does not answer.
async fn silent_older(run: &Location, identity: &Identity) -> Result<Option<u64>> {
    let Some((epoch, owner)) = newest(run).await?.filter(|(_, owner)| !owner.reads_packs) else {
        return Ok(None);
    };
    if !answers(&identity.dialer, &owner.address).await {
        return Ok(Some(epoch));
    }
    let message = format!(
        "{} is served by the coordinator at {}, an older build that does not know packed \
         receipts; serve it with this build or a later one, or stop that coordinator",
        run.uri(),
        owner.address
    );
    Err(Error::new(Reason::Unimplemented, message)
        .with("feature", "packed receipts")
        .with(OWNER, &owner.address))
}

/// Returns the last epoch of a run that no other live coordinator owns; 0 if it had no owner yet.
///
/// A live owner is not displaced, else two coordinators would take the run from each other at every
/// call. An owner of this very address cannot be alive: this process listens there, so it is our
/// own predecessor. A wrong guess (an owner that is only slow) does no harm to the receipts, which
/// are created conditionally; it costs the work in progress.
async fn last_epoch(run: &Location, identity: &Identity) -> Result<u64> {
    let Some((epoch, owner)) = newest(run).await? else {
        return Ok(0);
    };
    if owner.instance != identity.instance
        && owner.address != identity.address
        && answers(&identity.dialer, &owner.address).await
    {
        return Err(not_owner(&owner));
    }
    Ok(epoch)
}

async fn newest(run: &Location) -> Result<Option<(u64, OwnerFact)>> {
    let keys = run.list("owner").await?;
    let epoch = |key: &str| {
        key.strip_prefix("owner/")?
            .strip_suffix(".json")?
            .parse::<u64>()
            .ok()
    };
    let Some(newest) = keys.iter().filter_map(|(key, _)| epoch(key)).max() else {
        return Ok(None);
    };
    let bytes = run.get(&key(newest)).await?;
    let fact = serde_json::from_slice(&bytes).map_err(|e| {
        Error::internal(format!("{} is damaged", run.uri_of(&key(newest)))).because(e)
    })?;
    Ok(Some((newest, fact)))
}

/// Returns whether a coordinator serves at `address`. An open port proves nothing: another program
/// may listen there by now, and a process that hangs still accepts connections. So a health check
/// must be answered.
async fn answers(dialer: &Dialer, address: &str) -> bool {
    let asked = async {
        let mut health = HealthClient::new(dialer.connect(address, |e| e).await.ok()?);
        let answer = health
            .check(HealthCheckRequest {
                service: SERVICE_NAME.to_owned(),
            })
            .await
            .ok()?;
        (answer.into_inner().status() == ServingStatus::Serving).then_some(())
    };
    timeout(ANSWER_WITHIN, asked)
        .await
        .is_ok_and(|serves| serves.is_some())
}

fn key(epoch: u64) -> String {
    format!("owner/{epoch}.json")
}

fn not_owner(owner: &OwnerFact) -> Error {
    let address = &owner.address;
    let message = format!("the run is owned by the coordinator at {address}; ask there");
    Error::new(Reason::NotOwner, message)
        .with(OWNER, address)
        .with(INSTANCE, &owner.instance)
}

/// Whether another process took a run over under our own address: two that live at once take it
/// from each other without end, since neither can tell callers of another place to ask.
///
/// `error` is what [`Ownership::check`] said.
pub fn is_twin(error: &Error, us: &Identity) -> bool {
    let instance = error.value(INSTANCE);
    error.value(OWNER) == Some(&us.address) && instance.is_some_and(|other| other != us.instance)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{StorageConfig, Stores};

    fn identity(address: &str, instance: &str) -> Identity {
        Identity {
            address: address.into(),
            instance: instance.into(),
            dialer: Dialer::default(),
        }
    }

    #[tokio::test]
    async fn a_live_owner_keeps_its_run_and_a_dead_one_loses_it() {
        let run = Stores::new(StorageConfig::default())
            .open("memory:///runs/r")
            .unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let alive = format!("http://{}", listener.local_addr().unwrap());
        let (health, service) = tonic_health::server::health_reporter();
        health
            .set_service_status(SERVICE_NAME, tonic_health::ServingStatus::Serving)
            .await;
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(incoming),
        );
        let first = Ownership::claim(&run, &identity(&alive, "a"))
            .await
            .unwrap();
        first.check().await.unwrap();
        let other = identity("http://127.0.0.1:1", "b");
        let refused = Ownership::check_free(&run, &other).await.unwrap_err();
        assert_eq!(refused.value("owner"), Some(alive.as_str()));
        let refused = Ownership::claim(&run, &identity("http://127.0.0.1:1", "b"))
            .await
            .unwrap_err();
        assert_eq!(
            (refused.reason(), refused.value("owner")),
            (Reason::NotOwner, Some(alive.as_str()))
        );
        health
            .set_service_status(SERVICE_NAME, tonic_health::ServingStatus::NotServing)
            .await;
        Ownership::check_free(&run, &other).await.unwrap();
        first.check().await.unwrap();
        Ownership::claim(&run, &other).await.unwrap();
        assert_eq!(first.check().await.unwrap_err().reason(), Reason::NotOwner);
    }

    #[tokio::test]
    async fn an_owner_of_an_older_build_is_kept_out_unless_it_answers() {
        let run = Stores::new(StorageConfig::default())
            .open("memory:///runs/r")
            .unwrap();
        let us = identity("superbatch state compact", "p");
        keep_out_older(&run, &us).await.unwrap();
        assert!(run.list("owner").await.unwrap().is_empty(), "no owner");
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let alive = format!("http://{}", listener.local_addr().unwrap());
        let (health, service) = tonic_health::server::health_reporter();
        let serving = tonic_health::ServingStatus::Serving;
        health.set_service_status(SERVICE_NAME, serving).await;
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(incoming),
        );
        // As older builds write it.
        let older = |address: &str| {
            let fact = format!(r#"{{"address": "{address}", "instance": "o", "nonce": "n"}}"#);
            bytes::Bytes::from(fact)
        };
        run.create("owner/1.json", older(&alive)).await.unwrap();
        let refused = keep_out_older(&run, &us).await.unwrap_err();
        assert_eq!(refused.reason(), Reason::Unimplemented);
        assert!(refused.to_string().contains(&alive), "{refused}");
        let dead = older("http://127.0.0.1:1");
        run.create("owner/2.json", dead).await.unwrap();
        check_reads_packs(&run, &us).await.unwrap();
        assert_eq!(run.list("owner").await.unwrap().len(), 2);
        let hung = Ownership::since(&run, 2);
        keep_out_older(&run, &us).await.unwrap();
        assert_eq!(hung.check().await.unwrap_err().reason(), Reason::NotOwner);
        // This build's own is left alone, and takes over from us.
        let ours = Ownership::claim(&run, &identity(&alive, "a"))
            .await
            .unwrap();
        keep_out_older(&run, &us).await.unwrap();
        ours.check().await.unwrap();
    }

    #[tokio::test]
    async fn a_restart_at_the_same_address_takes_over_at_once() {
        let run = Stores::new(StorageConfig::default())
            .open("memory:///runs/r")
            .unwrap();
        Ownership::claim(&run, &identity("http://127.0.0.1:1", "a"))
            .await
            .unwrap();
        let (at, us) = ("http://127.0.0.1:1", identity("http://127.0.0.1:1", "b"));
        let second = Ownership::claim(&run, &us).await.unwrap();
        second.check().await.unwrap();
        // One that lives on beside us, at the same address.
        let twin = Ownership::claim(&run, &identity(at, "c")).await.unwrap();
        twin.check().await.unwrap();
        let error = second.check().await.unwrap_err();
        assert!(is_twin(&error, &us), "{error}");
        Ownership::claim(&run, &us).await.unwrap();
        assert!(
            !is_twin(&second.check().await.unwrap_err(), &us),
            "it is us again"
        );
    }
}
