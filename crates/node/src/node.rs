//! What the parts of a daemon share.

use crate::config::{Folders, NodeConfig, StoreChoice};
use crate::error::{NodeError, Result};
use crate::http::Target;
use crate::instances::Instances;
use crate::journal::{self, About, Told};
use crate::paths::Paths;
use crate::pool::{Pool, Read};
use crate::records::{HostInfo, now_ms};
use crate::relocate::ReadOnly;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ServerConfig};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};
use steadfast_cluster::events::{Event, What};
use steadfast_store::{Commit, EtcdSpec, Kv, StoreSpec};
use steadfast_types::HostId;
use tokio::sync::{Notify, watch};

/// See the module.
pub struct Node {
    /// Its files.
    pub folders: Folders,
    /// The `steadfast` binary.
    pub program: PathBuf,
    /// Its VM processes.
    pub instances: Instances,
    tls: RwLock<Tls>,
    /// Numbers of certificates whose connections are to be closed.
    revoked: watch::Sender<BTreeSet<String>>,
    /// Wakes the leader's loop.
    pub wake: Notify,
    /// `program` is another binary now: the daemon shall become it.
    pub replaced: Notify,
    /// Names this run of the daemon.
    pub run: u64,
    /// Drills that are due are held one at a time.
    pub drilling: tokio::sync::Mutex<()>,
    /// One drill at a time on this host.
    pub drill_here: Mutex<()>,
    /// The pool as it was read last.
    latest: Mutex<Option<Read>>,
    /// Heartbeats over the replication paths.
    pub paths: Paths,
    /// This host's member of the store leads, as it said last.
    pub leads_store: AtomicBool,
    /// It has a vote, as the others said last.
    pub store_vote: AtomicBool,
    config: RwLock<NodeConfig>,
    kv: RwLock<Arc<dyn Kv>>,
}

/// TLS with this host's certificate.
#[derive(Clone)]
struct Tls {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

impl Tls {
    fn load(folders: &Folders) -> Result<Self> {
        Ok(Self {
            server: crate::tls::server(&folders.tls(), &folders.crl())?,
            client: crate::tls::client(&folders.tls(), &folders.crl())?,
        })
    }
}

impl Node {
    /// Opens the store and all.
    ///
    /// # Errors
    /// Certificates or the store cannot be opened.
    pub fn new(folders: Folders, config: NodeConfig, program: PathBuf) -> Result<Self> {
        let kv = steadfast_store::open(&config.store_spec(&folders))?;
        let run = steadfast_store::random_u64().map_err(|source| NodeError::Io {
            what: "random numbers".into(),
            source,
        })?;
        Ok(Self {
            tls: RwLock::new(Tls::load(&folders)?),
            revoked: watch::Sender::new(BTreeSet::new()),
            instances: Instances::new(folders.clone(), config.clone(), program.clone()),
            wake: Notify::new(),
            replaced: Notify::new(),
            run,
            drilling: tokio::sync::Mutex::new(()),
            drill_here: Mutex::new(()),
            latest: Mutex::default(),
            paths: Paths::default(),
            leads_store: AtomicBool::new(false),
            store_vote: AtomicBool::new(false),
            kv: RwLock::new(kv),
            config: RwLock::new(config),
            program,
            folders,
        })
    }

    /// This host's settings now.
    #[must_use]
    pub fn config(&self) -> NodeConfig {
        self.config.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// This host's name.
    #[must_use]
    pub fn host(&self) -> HostId {
        self.config
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .host
            .clone()
    }

    /// The store now.
    #[must_use]
    pub fn kv(&self) -> Arc<dyn Kv> {
        Arc::clone(&self.kv.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Reads the pool. Blocks.
    ///
    /// # Errors
    /// The store's.
    pub fn load_pool(&self) -> Result<Read> {
        let began = Instant::now();
        let pool = Pool::load(&*self.kv())?;
        Ok(self.keep_latest(pool, began))
    }

    /// Makes a change, and reads the pool as it is then. Blocks.
    ///
    /// # Errors
    /// The store's, or it was restored.
    pub fn commit_and_load(&self, commit: &Commit) -> Result<Read> {
        let began = Instant::now();
        match Pool::commit_and_load(&*self.kv(), commit)? {
            Some(pool) => Ok(self.keep_latest(pool, began)),
            None => Err(NodeError::Refused("the store was restored; tried again".into())),
        }
    }

    fn keep_latest(&self, pool: Pool, began: Instant) -> Read {
        let read = Read {
            pool: Arc::new(pool),
            began,
            ended: Instant::now(),
        };
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        // Another may have begun later and ended sooner: what is believed does not go back in time.
        if latest.as_ref().is_none_or(|known| known.began <= began) {
            *latest = Some(read.clone());
        }
        read
    }

    /// The pool as it was read last, if that was begun so lately.
    #[must_use]
    pub fn latest_pool(&self, within: Duration) -> Option<Read> {
        let latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        latest.clone().filter(|read| read.began.elapsed() < within)
    }

    /// Changes this host's settings, on disk first; opens the store that they name.
    ///
    /// # Errors
    /// The settings cannot be written, or the store cannot be opened.
    pub fn set_config(&self, config: NodeConfig) -> Result<()> {
        config.save(&self.folders)?;
        let spec = config.store_spec(&self.folders);
        let old = self.config().store_spec(&self.folders);
        self.instances.set_config(config.clone());
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = config;
        match (&old, &spec) {
            // The same cluster: what was seen of it still counts.
            (old, new) if old == new => {}
            (StoreSpec::Etcd { etcd: old }, StoreSpec::Etcd { etcd: new })
                if *new
                    == EtcdSpec {
                        endpoints: new.endpoints.clone(),
                        ..old.clone()
                    } =>
            {
                self.kv().set_endpoints(&new.endpoints);
            }
            _ => {
                let kv = steadfast_store::open(&spec)?;
                *self.kv.write().unwrap_or_else(PoisonError::into_inner) = kv;
            }
        }
        Ok(())
    }

    /// Refuses changes from now on, and waits for those under way.
    ///
    /// # Errors
    /// They did not end within `bound`; changes are taken again.
    pub fn freeze_store(&self, bound: Duration) -> Result<Arc<dyn Kv>> {
        let source = self.kv();
        *self.kv.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(ReadOnly(Arc::clone(&source)));
        let until = Instant::now() + bound;
        // Ours and the read-only one's; all others belong to changes under way.
        while Arc::strong_count(&source) > 2 {
            if Instant::now() > until {
                self.thaw_store(source);
                return Err(NodeError::Refused(
                    "changes to the store do not end; try again".into(),
                ));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(source)
    }

    /// Takes changes again.
    pub fn thaw_store(&self, store: Arc<dyn Kv>) {
        *self.kv.write().unwrap_or_else(PoisonError::into_inner) = store;
    }

    /// Runs blocking work, on the store say, outside the runtime's own threads.
    ///
    /// # Errors
    /// Those of the work.
    pub async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Node) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let node = Arc::clone(self);
        tokio::task::spawn_blocking(move || work(&node))
            .await
            .map_err(|e| NodeError::Refused(format!("a task of the daemon ended: {e}")))?
    }

    /// TLS for the API's listener, as of now.
    #[must_use]
    pub fn server_tls(&self) -> Arc<ServerConfig> {
        self.tls
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .server
            .clone()
    }

    /// Reads this host's certificate and the list of revoked ones anew, also for the store.
    ///
    /// # Errors
    /// They cannot be read. Those in use stay.
    pub fn reload_tls(&self) -> Result<()> {
        let tls = Tls::load(&self.folders)?;
        *self.tls.write().unwrap_or_else(PoisonError::into_inner) = tls;
        let config = self.config();
        if matches!(config.store, StoreChoice::Managed { .. }) {
            let kv = steadfast_store::open(&config.store_spec(&self.folders))?;
            *self.kv.write().unwrap_or_else(PoisonError::into_inner) = kv;
        }
        Ok(())
    }

    /// Closes the connections of these certificates.
    pub fn close_revoked(&self, serials: BTreeSet<String>) {
        self.revoked.send_replace(serials);
    }

    /// Until a certificate is revoked.
    pub async fn until_revoked(&self, serial: &str) {
        let mut list = self.revoked.subscribe();
        if list.wait_for(|l| l.contains(serial)).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// How another host's daemon is asked.
    ///
    /// # Errors
    /// A name that cannot stand in a certificate.
    pub fn target(&self, host: &HostId, info: &HostInfo) -> Result<Target> {
        let name = ServerName::try_from(host.to_string()).map_err(|_| {
            NodeError::Certificates(format!("{host} cannot be a host's name in a certificate"))
        })?;
        Ok(Target::Tls {
            at: info.api,
            name,
            config: self
                .tls
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .client
                .clone(),
        })
    }

    /// Keeps an event. Blocks.
    pub fn event(&self, about: impl Into<About>, what: What, why: impl Into<String>) {
        self.event_at(now_ms(), about, what, why);
    }

    /// Keeps an event of some moment before this one. Blocks.
    pub fn event_at(&self, at_ms: u64, about: impl Into<About>, what: What, why: impl Into<String>) {
        let (vm, host) = about.into().split();
        let mut told = Told {
            by: self.host(),
            event: Event::new(at_ms, vm, host, what, why),
        };
        tracing::info!("{}", told.event);
        journal::write(&*self.kv(), &mut told);
    }

    /// Keeps a line for people. Blocks.
    pub fn note(&self, about: impl Into<About>, text: impl Into<String>) {
        self.event(about, What::Note, text);
    }
}
