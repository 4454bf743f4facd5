//! TLS of the API: hosts prove themselves to each other with the pool's certificates; a joining host knows only the CA's
//! fingerprint.

use crate::error::{NodeError, Result};
use crate::pki::fingerprint;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use std::path::Path;
use std::sync::Arc;
use steadfast_store::TlsFiles;

fn wrong(error: impl std::fmt::Display) -> NodeError {
    NodeError::Certificates(error.to_string())
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

type Chain = Vec<CertificateDer<'static>>;

/// The list of revoked certificates; none before the first.
fn revoked(crl: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>> {
    if !crl.exists() {
        return Ok(Vec::new());
    }
    let bad = |e: rustls::pki_types::pem::Error| wrong(format!("{}: {e}", crl.display()));
    let list = CertificateRevocationListDer::from_pem_file(crl).map_err(bad)?;
    Ok(vec![list])
}

fn load(files: &TlsFiles) -> Result<(Arc<RootCertStore>, Chain, PrivateKeyDer<'static>)> {
    let named =
        |path: &std::path::Path, e: rustls::pki_types::pem::Error| wrong(format!("{}: {e}", path.display()));
    let ca = CertificateDer::from_pem_file(&files.ca).map_err(|e| named(&files.ca, e))?;
    let certificate =
        CertificateDer::from_pem_file(&files.certificate).map_err(|e| named(&files.certificate, e))?;
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|e| named(&files.key, e))?;
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone()).map_err(wrong)?;
    // The CA goes along, for those who know only its fingerprint.
    Ok((Arc::new(roots), vec![certificate, ca], key))
}

/// For the API's listener. Clients without a certificate are let in: what they may ask is decided by who they are.
///
/// # Errors
/// The files cannot be read, or do not fit together.
pub fn server(files: &TlsFiles, crl: &Path) -> Result<Arc<ServerConfig>> {
    let (roots, chain, key) = load(files)?;
    let mut verifier = WebPkiClientVerifier::builder_with_provider(roots, provider()).allow_unauthenticated();
    let crls = revoked(crl)?;
    if !crls.is_empty() {
        verifier = verifier.with_crls(crls).only_check_end_entity_revocation();
    }
    let verifier = verifier.build().map_err(wrong)?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(wrong)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(wrong)?;
    // A resumed session would skip the certificate, and with it revocation and expiry.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    Ok(Arc::new(config))
}

/// For requests to other hosts.
///
/// # Errors
/// The files cannot be read, or do not fit together.
pub fn client(files: &TlsFiles, crl: &Path) -> Result<Arc<ClientConfig>> {
    let (roots, chain, key) = load(files)?;
    let mut verifier = WebPkiServerVerifier::builder_with_provider(roots, provider());
    let crls = revoked(crl)?;
    if !crls.is_empty() {
        verifier = verifier.with_crls(crls).only_check_end_entity_revocation();
    }
    let verifier = verifier.build().map_err(wrong)?;
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(wrong)?
        .with_webpki_verifier(verifier)
        .with_client_auth_cert(chain, key)
        .map_err(wrong)?;
    config.resumption = rustls::client::Resumption::disabled();
    Ok(Arc::new(config))
}

/// For a host that joins: whoever shows a chain that ends in the CA with this fingerprint.
///
/// # Errors
/// None is expected.
pub fn joining(ca_fingerprint: &str) -> Result<Arc<ClientConfig>> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(wrong)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Pinned {
            fingerprint: ca_fingerprint.into(),
            provider: provider(),
        }))
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// Takes the CA from the chain itself if its fingerprint is the expected one, then checks as usual.
#[derive(Debug)]
struct Pinned {
    fingerprint: String,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        let pinned = intermediates.iter().find(|c| fingerprint(c) == self.fingerprint);
        let ca = pinned.ok_or_else(|| {
            rustls::Error::General(
                "it is not of the pool that the token is for (the CA's fingerprint differs)".into(),
            )
        })?;
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        let verifier =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider))
                .build()
                .map_err(|e| rustls::Error::General(e.to_string()))?;
        verifier.verify_server_cert(end_entity, &[], server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken here".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
