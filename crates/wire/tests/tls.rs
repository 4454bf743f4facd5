//! TLS 1.3 with mutual certificates: what must connect, and what must not and why (row 49).
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::*;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, IsCa, Issuer, KeyIdMethod,
    KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber, date_time_ymd,
};
use std::path::PathBuf;
use steadfast_types::HostId;
use steadfast_wire::link::{Down, Link, OpenError, Security, TlsError, TlsFiles};
use steadfast_wire::{Event, LinkConfig};

struct Ca {
    dir: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Ca {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut p = CertificateParams::default();
        p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        p.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        p.distinguished_name.push(DnType::CommonName, "pool CA");
        let cert = p.self_signed(&key).unwrap();
        let pem = cert.pem();
        Self {
            dir: tempfile::tempdir().unwrap(),
            issuer: Issuer::new(p, key),
            pem,
        }
    }

    fn issue(&self, name: &str, change: impl Fn(&mut CertificateParams)) -> TlsFiles {
        let key = KeyPair::generate().unwrap();
        let mut p = CertificateParams::new(vec![name.to_owned()]).unwrap();
        change(&mut p);
        let cert = p.signed_by(&key, &self.issuer).unwrap();
        let file = |kind: &str, text: String| -> PathBuf {
            let path = self.dir.path().join(format!(
                "{name}-{kind}-{}.pem",
                key.serialized_der().len() + text.len()
            ));
            std::fs::write(&path, text).unwrap();
            path
        };
        TlsFiles {
            ca: file("ca", self.pem.clone()),
            cert: file("cert", cert.pem()),
            key: file("key", key.serialize_pem()),
            crl: None,
        }
    }
}

fn with(files: TlsFiles) -> impl Fn(&mut LinkConfig) {
    move |c| c.security = Security::Tls(files.clone())
}

/// Both ends' reasons for not connecting.
fn reasons(connecting: TlsFiles, listening: TlsFiles) -> (Down, Down) {
    let b = listener(1, with(listening));
    let a = connector(&addresses(&b), with(connecting));
    let failed = |e| match e {
        Event::ConnectFailed { why, .. } => Some(why),
        Event::PathUp { .. } => panic!("must not connect"),
        _ => None,
    };
    (
        a.wait("the connector's reason", failed),
        b.wait("the listener's reason", failed),
    )
}

#[test]
fn good_certificates_connect_and_carry_frames() {
    let ca = Ca::new();
    let b = listener(2, with(ca.issue("beta", |_| {})));
    let proxies: Vec<Proxy> = addresses(&b).into_iter().map(Proxy::new).collect();
    let a = connector(
        &proxies.iter().map(|p| p.addr).collect::<Vec<_>>(),
        with(ca.issue("alpha", |_| {})),
    );
    a.wait_up(2);
    b.wait_up(2);
    let (to_b, to_a) = (a.link.sender(), b.link.sender());
    std::thread::scope(|s| {
        s.spawn(move || (0..1500).for_each(|i| send_on(&to_b, &numbered(i))));
        s.spawn(move || (0..1500).for_each(|i| send_on(&to_a, &numbered(i))));
        proxies[0].kill();
        proxies[1]
            .faults
            .corrupt
            .store(1, std::sync::atomic::Ordering::Relaxed);
        b.expect_numbers(0, 1500);
        a.expect_numbers(0, 1500);
    });
    assert_eq!(a.link.stats().resets, 0);
}

#[test]
fn a_certificate_of_another_ca_is_refused() {
    let (ours, theirs) = (Ca::new(), Ca::new());
    let (a, b) = reasons(theirs.issue("alpha", |_| {}), ours.issue("beta", |_| {}));
    assert!(matches!(&a, Down::Tls(_)), "{a}");
    assert!(matches!(&b, Down::Tls(_)), "{b}");
    // A connector with the right CA for the server, but a certificate of its own that is not of the pool.
    let good = ours.issue("alpha", |_| {});
    let bad = theirs.issue("alpha", |_| {});
    let mixed = TlsFiles { ca: good.ca, ..bad };
    let (a, b) = reasons(mixed, ours.issue("beta", |_| {}));
    assert!(
        matches!(&b, Down::Tls(t) if t.contains("UnknownIssuer") || t.contains("BadSignature")),
        "{b}"
    );
    assert!(matches!(&a, Down::Tls(_) | Down::PeerClosed | Down::Reset), "{a}");
}

#[test]
fn a_certificate_for_another_host_is_refused() {
    let ca = Ca::new();
    let (a, _) = reasons(ca.issue("alpha", |_| {}), ca.issue("gamma", |_| {}));
    assert!(
        matches!(&a, Down::Tls(t) if t.contains("not valid for name")),
        "{a}"
    );
    let (_, b) = reasons(ca.issue("gamma", |_| {}), ca.issue("beta", |_| {}));
    assert!(
        matches!(&b, Down::WrongName { expected } if expected == "alpha"),
        "{b}"
    );
}

#[test]
fn an_expired_certificate_is_refused() {
    let ca = Ca::new();
    let old = |p: &mut CertificateParams| {
        p.not_before = date_time_ymd(2020, 1, 1);
        p.not_after = date_time_ymd(2021, 1, 1);
    };
    let (_, b) = reasons(ca.issue("alpha", old), ca.issue("beta", |_| {}));
    assert!(matches!(&b, Down::Tls(t) if t.contains("expired")), "{b}");
    let (a, _) = reasons(ca.issue("alpha", |_| {}), ca.issue("beta", old));
    assert!(matches!(&a, Down::Tls(t) if t.contains("expired")), "{a}");
}

#[test]
fn a_revoked_certificate_is_refused() {
    let ca = Ca::new();
    let serial = SerialNumber::from(4711u64);
    let revoked = ca.issue("alpha", |p| p.serial_number = Some(SerialNumber::from(4711u64)));
    let crl = CertificateRevocationListParams {
        this_update: date_time_ymd(2024, 1, 1),
        next_update: date_time_ymd(2090, 1, 1),
        crl_number: SerialNumber::from(1u64),
        issuing_distribution_point: None,
        revoked_certs: vec![RevokedCertParams {
            serial_number: serial,
            revocation_time: date_time_ymd(2024, 1, 1),
            reason_code: None,
            invalidity_date: None,
        }],
        key_identifier_method: KeyIdMethod::Sha256,
    };
    let path = ca.dir.path().join("crl.pem");
    std::fs::write(&path, crl.signed_by(&ca.issuer).unwrap().pem().unwrap()).unwrap();
    let listening = TlsFiles {
        crl: Some(path),
        ..ca.issue("beta", |_| {})
    };
    let (_, b) = reasons(revoked, listening);
    assert!(matches!(&b, Down::Tls(t) if t.contains("Revoked")), "{b}");
}

#[test]
fn plain_and_tls_do_not_mix() {
    let ca = Ca::new();
    let b = listener(1, with(ca.issue("beta", |_| {})));
    let a = connector(&addresses(&b), |_| {});
    let failed = |e| match e {
        Event::ConnectFailed { why, .. } => Some(why),
        Event::PathUp { .. } => panic!("must not connect"),
        _ => None,
    };
    let why = b.wait("the listener's reason", failed);
    assert!(matches!(why, Down::Tls(_)), "{why}");
    a.wait("the connector's reason", failed);
}

#[test]
fn unusable_files_are_named() {
    let ca = Ca::new();
    let good = ca.issue("alpha", |_| {});
    let open = |files: TlsFiles| {
        let mut c = config(
            steadfast_wire::link::Role::Connect,
            vec![steadfast_wire::link::PathConfig::new(any_port())],
        );
        c.security = Security::Tls(files);
        Link::open(c, |_| {}).map(|_| ()).unwrap_err()
    };
    let missing = TlsFiles {
        key: "/nonexistent/key.pem".into(),
        ..good.clone()
    };
    let e = open(missing);
    assert!(e.to_string().contains("/nonexistent/key.pem"), "{e}");
    let empty = ca.dir.path().join("empty.pem");
    std::fs::write(&empty, "").unwrap();
    assert!(matches!(
        open(TlsFiles {
            ca: empty,
            ..good.clone()
        }),
        OpenError::Tls(TlsError::File { .. })
    ));
    let other = ca.issue("alpha2", |_| {});
    assert!(matches!(
        open(TlsFiles {
            key: other.key,
            ..good
        }),
        OpenError::Tls(TlsError::Unusable(_))
    ));
    assert!(HostId::new("alpha").is_ok());
}
