//! The pool's own certificates: one CA for each pool, one certificate for each host, and join tokens.
//!
//! A host's certificate carries its name (what replication links check), its address and loopback (what etcd's clients
//! check). The CA's key is kept in the store, which only hosts of the pool can read, so that any of them can let a new one in. A
//! join token is `ID.SECRET.FINGERPRINT`: the store holds a hash of the secret and when it ends; the fingerprint of the CA tells
//! the joining host that it speaks to the right pool before it sends the secret.

use crate::config::{Folders, write_file};
use crate::error::{IoContext, NodeError, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertificateSigningRequestParams,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevocationReason,
    RevokedCertParams, SanType, SerialNumber,
};
use ring::digest::{SHA256, digest};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, SystemTime};
use steadfast_store::random_u64;
use steadfast_types::HostId;

/// Clocks of hosts may be so far apart: a certificate holds from so long before it was made.
const CLOCKS_APART: Duration = Duration::from_secs(3600);
/// What a list of revoked certificates says of its own end; nobody here asks for it.
const CRL_LIFETIME: Duration = Duration::from_secs(100 * 365 * 86_400);

fn wrong(error: impl std::fmt::Display) -> NodeError {
    NodeError::Certificates(error.to_string())
}

/// A certificate and its key, PEM.
#[derive(Clone)]
pub struct Pair {
    /// The certificate.
    pub certificate: String,
    /// Its key.
    pub key: String,
}

/// Makes a CA.
///
/// # Errors
/// No random numbers, say.
pub fn new_ca(pool: &str) -> Result<Pair> {
    let key = KeyPair::generate().map_err(wrong)?;
    let mut params = CertificateParams::new(Vec::new()).map_err(wrong)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let name = format!("Steadfast pool {pool}");
    params.distinguished_name.push(DnType::CommonName, name);
    let certificate = params.self_signed(&key).map_err(wrong)?;
    Ok(Pair {
        certificate: certificate.pem(),
        key: key.serialize_pem(),
    })
}

/// A new key and the request to sign its public half.
///
/// # Errors
/// No random numbers, say.
pub fn new_request() -> Result<(String, String)> {
    let key = KeyPair::generate().map_err(wrong)?;
    let params = CertificateParams::new(Vec::new()).map_err(wrong)?;
    let request = params.serialize_request(&key).map_err(wrong)?;
    Ok((key.serialize_pem(), request.pem().map_err(wrong)?))
}

/// The request to sign the public half of a key that there is already.
///
/// # Errors
/// It is no key.
pub fn request_of(key: &str) -> Result<String> {
    let key = KeyPair::from_pem(key).map_err(wrong)?;
    let params = CertificateParams::new(Vec::new()).map_err(wrong)?;
    params
        .serialize_request(&key)
        .and_then(|r| r.pem())
        .map_err(wrong)
}

/// A certificate, and what is to be known of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    /// PEM.
    pub certificate: String,
    /// Its number, hexadecimal.
    pub serial: String,
    /// When it ends, wall clock, ms.
    pub ends_ms: u64,
}

/// Reads a certificate, PEM.
///
/// # Errors
/// It is none.
pub fn read(certificate: String) -> Result<Made> {
    let der = CertificateDer::from_pem_slice(certificate.as_bytes()).map_err(wrong)?;
    let (serial, ends_ms) = number_and_end(&der)?;
    Ok(Made {
        certificate,
        serial,
        ends_ms,
    })
}

/// A certificate's number and when it ends, wall clock, ms.
///
/// # Errors
/// It is none.
pub fn number_and_end(der: &[u8]) -> Result<(String, u64)> {
    let (_, parsed) = x509_parser::parse_x509_certificate(der).map_err(wrong)?;
    let ends = parsed.validity().not_after.timestamp();
    let ends_ms = u64::try_from(ends).unwrap_or(0).saturating_mul(1000);
    Ok((hex(parsed.raw_serial()), ends_ms))
}

/// The list of revoked certificates.
///
/// # Errors
/// The CA is none, or a number is none.
pub fn sign_crl<'a>(ca: &Pair, number: u64, serials: impl Iterator<Item = &'a String>) -> Result<String> {
    let issuer = Issuer::from_ca_cert_pem(&ca.certificate, KeyPair::from_pem(&ca.key).map_err(wrong)?);
    let issuer = issuer.map_err(wrong)?;
    let now = SystemTime::now();
    let revoked = |serial: &String| {
        let digits = serial.as_bytes().chunks(2);
        let bytes = digits.map(|d| u8::from_str_radix(&String::from_utf8_lossy(d), 16));
        let bytes = bytes
            .collect::<std::result::Result<Vec<u8>, _>>()
            .map_err(wrong)?;
        Ok(RevokedCertParams {
            serial_number: SerialNumber::from_slice(&bytes),
            revocation_time: now.into(),
            reason_code: Some(RevocationReason::CessationOfOperation),
            invalidity_date: None,
        })
    };
    let params = CertificateRevocationListParams {
        this_update: (now - CLOCKS_APART).into(),
        // It holds until there is another one: a list that ends by itself would end the pool.
        next_update: (now + CRL_LIFETIME).into(),
        crl_number: SerialNumber::from(number),
        issuing_distribution_point: None,
        revoked_certs: serials.map(revoked).collect::<Result<_>>()?,
        key_identifier_method: KeyIdMethod::Sha256,
    };
    params.signed_by(&issuer).and_then(|crl| crl.pem()).map_err(wrong)
}

/// Signs a host's certificate. Of the request only the public key is taken.
///
/// # Errors
/// The request or the CA is no such thing.
pub fn sign(ca: &Pair, request: &str, host: &HostId, addresses: &[IpAddr], lifetime_ms: u64) -> Result<Made> {
    let request = CertificateSigningRequestParams::from_pem(request).map_err(wrong)?;
    let issuer = Issuer::from_ca_cert_pem(&ca.certificate, KeyPair::from_pem(&ca.key).map_err(wrong)?);
    let issuer = issuer.map_err(wrong)?;
    let names = vec![host.to_string(), "localhost".to_string()];
    let mut params = CertificateParams::new(names).map_err(wrong)?;
    let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let ips = addresses.iter().copied().chain([loopback]);
    params.subject_alt_names.extend(ips.map(SanType::IpAddress));
    params
        .distinguished_name
        .push(DnType::CommonName, host.to_string());
    let random = || random_u64().what(|| "random numbers".into());
    let mut number = [random()?.to_be_bytes(), random()?.to_be_bytes()].concat();
    // Positive, and of full length.
    number[0] = number[0] & 0x3f | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&number));
    let now = SystemTime::now();
    params.not_before = (now - CLOCKS_APART).into();
    params.not_after = (now + Duration::from_millis(lifetime_ms)).into();
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    let signed = params.signed_by(&request.public_key, &issuer).map_err(wrong)?;
    read(signed.pem())
}

/// Writes a host's files.
///
/// # Errors
/// The folder cannot be written.
pub fn install(folders: &Folders, ca: &str, host: &Pair, crl: &str) -> Result<()> {
    std::fs::create_dir_all(&folders.data).what(|| format!("make {}", folders.data.display()))?;
    let files = folders.tls();
    write_file(&files.ca, ca.as_bytes())?;
    if !crl.is_empty() {
        write_file(&folders.crl(), crl.as_bytes())?;
    }
    write_file(&files.key, host.key.as_bytes())?;
    write_file(&files.certificate, host.certificate.as_bytes())
}

/// Lower-case hexadecimal.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// SHA-256 of a certificate.
#[must_use]
pub fn fingerprint(der: &[u8]) -> String {
    hex(digest(&SHA256, der).as_ref())
}

/// SHA-256 of a PEM certificate's DER form.
///
/// # Errors
/// It is none.
pub fn fingerprint_of_pem(pem: &str) -> Result<String> {
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(wrong)?;
    Ok(fingerprint(&der))
}

/// A join token's parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// Names it in the store.
    pub id: String,
    /// What proves that its bearer was invited.
    pub secret: String,
    /// Of the pool's CA.
    pub fingerprint: String,
}

impl Token {
    /// A new one.
    ///
    /// # Errors
    /// No random numbers.
    pub fn new(fingerprint: &str) -> Result<Self> {
        let random = || random_u64().what(|| "random numbers".into());
        Ok(Self {
            id: format!("{:08x}", random()? as u32),
            secret: format!("{:016x}{:016x}", random()?, random()?),
            fingerprint: fingerprint.into(),
        })
    }

    /// What the store holds of it.
    #[must_use]
    pub fn hash(&self) -> String {
        fingerprint(self.secret.as_bytes())
    }

    /// Reads one.
    ///
    /// # Errors
    /// It is none.
    pub fn parse(text: &str) -> Result<Self> {
        let parts: Vec<&str> = text.trim().split('.').collect();
        let hex = |s: &str, n: usize| s.len() == n && s.bytes().all(|b| b.is_ascii_hexdigit());
        match parts[..] {
            [id, secret, print] if hex(id, 8) && hex(secret, 32) && hex(print, 64) => Ok(Self {
                id: id.into(),
                secret: secret.into(),
                fingerprint: print.into(),
            }),
            _ => Err(NodeError::Refused(
                "this is no join token; make one with `steadfast pool token` on a host of the pool".into(),
            )),
        }
    }
}

impl std::fmt::Display for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.id, self.secret, self.fingerprint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_read_back_and_nonsense_does_not() {
        let ca = new_ca("p").unwrap();
        let token = Token::new(&fingerprint_of_pem(&ca.certificate).unwrap()).unwrap();
        assert_eq!(Token::parse(&token.to_string()).unwrap(), token);
        for bad in ["", "a.b.c", &token.to_string()[1..], "....", "é.é.é"] {
            assert!(Token::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_host_is_signed_under_its_name_whatever_it_asks_for() {
        let ca = new_ca("p").unwrap();
        let (_, request) = new_request().unwrap();
        let host = HostId::new("a").unwrap();
        let made = sign(&ca, &request, &host, &[], 86_400_000).unwrap();
        assert_eq!(read(made.certificate.clone()).unwrap(), made);
        assert_eq!(made.serial.len(), 32);
        let left = made.ends_ms.saturating_sub(crate::records::now_ms());
        assert!((86_390_000..=86_400_000).contains(&left), "{left}");
        assert!(sign(&ca, "nonsense", &host, &[], 1000).is_err());
        assert!(sign_crl(&ca, 1, [].iter()).is_ok(), "an empty list is a list");
        assert!(sign_crl(&ca, 2, [made.serial].iter()).is_ok());
        assert!(sign_crl(&ca, 2, ["xyz".to_string()].iter()).is_err());
    }
}
