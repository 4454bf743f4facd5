//! TLS 1.3 with certificates on both sides (RFC 8446), through rustls with the ring provider.
//!
//! A host's certificate is signed by the pool's CA and carries the host's name as a DNS subject alternative name. Both
//! sides check chain, dates, revocation list (if given) and name; TLS 1.2 and session resumption are off.

use super::event::Down;
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{ClientConfig, Connection, RootCertStore, ServerConfig};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use steadfast_types::HostId;

/// Where a host's certificate is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// CA certificates that are trusted, PEM.
    pub ca: PathBuf,
    /// This host's certificate chain, PEM.
    pub cert: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
    /// Revoked certificates, PEM.
    pub crl: Option<PathBuf>,
}

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file that is missing or not PEM.
    #[error("cannot read {what} from {path}: {reason}")]
    File {
        /// What it should hold.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// Certificates, key or list do not fit together.
    #[error("the certificates cannot be used: {0}; check that key, certificate and CA belong together")]
    Unusable(String),
    /// The peer's name cannot stand in a certificate.
    #[error("the host name {0} cannot be checked in a certificate: use letters, digits, '-' and '.'")]
    Name(String),
}

/// Ready to open connections.
pub struct TlsContext {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    peer: ServerName<'static>,
}

fn read<T: PemObject>(what: &'static str, path: &Path) -> Result<Vec<T>, TlsError> {
    let fail = |reason: String| TlsError::File {
        what,
        path: path.to_owned(),
        reason,
    };
    let items = T::pem_file_iter(path).map_err(|e| fail(e.to_string()))?;
    let items = items
        .collect::<Result<Vec<T>, _>>()
        .map_err(|e| fail(e.to_string()))?;
    if items.is_empty() {
        Err(fail("it holds none".into()))
    } else {
        Ok(items)
    }
}

fn unusable(e: impl std::fmt::Display) -> TlsError {
    TlsError::Unusable(e.to_string())
}

impl TlsContext {
    /// Reads the files.
    ///
    /// # Errors
    /// [`TlsError`] says which file, and why.
    pub fn load(files: &TlsFiles, peer: &HostId) -> Result<Self, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let versions = &[&rustls::version::TLS13];
        let mut roots = RootCertStore::empty();
        for cert in read::<CertificateDer<'static>>("CA certificates", &files.ca)? {
            roots.add(cert).map_err(unusable)?;
        }
        let roots = Arc::new(roots);
        let chain = read::<CertificateDer<'static>>("certificates", &files.cert)?;
        let key = || {
            PrivateKeyDer::from_pem_file(&files.key).map_err(|e| TlsError::File {
                what: "a private key",
                path: files.key.clone(),
                reason: e.to_string(),
            })
        };
        let crls = match &files.crl {
            Some(p) => read::<CertificateRevocationListDer<'static>>("revoked certificates", p)?,
            None => Vec::new(),
        };
        let mut for_servers = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone());
        let mut for_clients = WebPkiClientVerifier::builder_with_provider(roots, provider.clone());
        if !crls.is_empty() {
            for_servers = for_servers
                .with_crls(crls.clone())
                .only_check_end_entity_revocation();
            for_clients = for_clients.with_crls(crls).only_check_end_entity_revocation();
        }
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(versions)
            .map_err(unusable)?
            .with_webpki_verifier(for_servers.build().map_err(unusable)?)
            .with_client_auth_cert(chain.clone(), key()?)
            .map_err(unusable)?;
        // A resumed session would skip the certificate, and with it revocation and expiry.
        client.resumption = rustls::client::Resumption::disabled();
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(unusable)?
            .with_client_cert_verifier(for_clients.build().map_err(unusable)?)
            .with_single_cert(chain, key()?)
            .map_err(unusable)?;
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        let peer =
            ServerName::try_from(peer.as_str().to_owned()).map_err(|_| TlsError::Name(peer.to_string()))?;
        Ok(Self {
            client: Arc::new(client),
            server: Arc::new(server),
            peer,
        })
    }

    /// A connection's state for the connecting side.
    pub fn client(&self) -> Result<Connection, Down> {
        rustls::ClientConnection::new(Arc::clone(&self.client), self.peer.clone())
            .map(Connection::from)
            .map_err(|e| Down::Tls(e.to_string()))
    }

    /// A connection's state for the listening side.
    pub fn server(&self) -> Result<Connection, Down> {
        rustls::ServerConnection::new(Arc::clone(&self.server))
            .map(Connection::from)
            .map_err(|e| Down::Tls(e.to_string()))
    }

    /// After the handshake: is the peer the host that is expected? (The connecting side's verifier has checked this
    /// already; the listening side's checks only the chain.)
    pub fn check_peer(&self, conn: &Connection) -> Result<(), Down> {
        let wrong = || Down::WrongName {
            expected: self.peer.to_str().into_owned(),
        };
        let cert = conn
            .peer_certificates()
            .and_then(|c| c.first())
            .ok_or_else(wrong)?;
        let parsed = ParsedCertificate::try_from(cert).map_err(|_| wrong())?;
        verify_server_name(&parsed, &self.peer).map_err(|_| wrong())
    }
}
