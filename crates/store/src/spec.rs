//! Which store: the JSON form that processes are given.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A store. A plain string is the folder of an embedded one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum StoreSpec {
    /// Folder of the embedded store, shared by processes of one host.
    Folder(PathBuf),
    /// An etcd cluster: `{"etcd": {"endpoints": [...], ...}}`.
    Etcd {
        /// How to reach it.
        etcd: EtcdSpec,
    },
}

/// How an etcd cluster is reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EtcdSpec {
    /// `http://HOST:PORT` or `https://HOST:PORT`, tried in this order; the one that answers is kept.
    pub endpoints: Vec<String>,
    /// Certificates, for `https`.
    #[serde(default)]
    pub tls: Option<TlsFiles>,
    /// All keys are below this one, so that several pools can share a cluster.
    #[serde(default = "prefix")]
    pub prefix: String,
    /// How long one member may take to answer, in milliseconds. A call ends after this for each endpoint at the latest.
    #[serde(default = "timeout_ms")]
    pub timeout_ms: u64,
}

/// PEM files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// The CA that signed the members' certificates.
    pub ca: PathBuf,
    /// This client's certificate chain.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

fn prefix() -> String {
    "steadfast/".into()
}

fn timeout_ms() -> u64 {
    2000
}

impl EtcdSpec {
    /// These endpoints, the rest as by default.
    #[must_use]
    pub fn new(endpoints: Vec<String>) -> Self {
        Self {
            endpoints,
            tls: None,
            prefix: prefix(),
            timeout_ms: timeout_ms(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_path_is_a_folder() {
        let spec: StoreSpec = serde_json::from_str(r#""/var/lib/store""#).unwrap();
        assert_eq!(spec, StoreSpec::Folder("/var/lib/store".into()));
        let text = r#"{"etcd":{"endpoints":["http://10.0.0.1:2379"],"timeout_ms":500}}"#;
        let spec: StoreSpec = serde_json::from_str(text).unwrap();
        assert!(
            matches!(&spec, StoreSpec::Etcd { etcd } if etcd.timeout_ms == 500 && etcd.prefix == "steadfast/")
        );
        assert_eq!(
            serde_json::from_str::<StoreSpec>(&serde_json::to_string(&spec).unwrap()).unwrap(),
            spec
        );
        assert!(serde_json::from_str::<StoreSpec>(r#"{"etcd":{"endpoints":[],"colour":1}}"#).is_err());
    }
}
