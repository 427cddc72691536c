//! Release statements: who signed counts, one statement has one form, and no signature serves twice.

use super::{alice, bob, mallory, signed, trust};
use crate::cose::{Envelope, Kind};
use crate::{ReleaseStatement, SignError, VerifyError, inspect_release, sign_release};
use crate::{verify, verify_release};

fn statement() -> ReleaseStatement {
    ReleaseStatement {
        component: "dataplane".to_owned(),
        version: 41,
        name: "0.4.1".to_owned(),
        sha384: [7; 48].into(),
    }
}

#[test]
fn what_was_signed_is_verified() {
    let envelope = sign_release(&statement(), &[alice(), bob()]).expect("signed");
    let verified = verify_release(&envelope, &trust(2)).expect("verified");
    assert_eq!(*verified, statement());
    assert_eq!(verified.signers().len(), 2);
    let release = verified.release().expect("a program");
    assert_eq!(
        (release.component.name(), release.version),
        ("dataplane", 41)
    );
    let (claimed, signers) = inspect_release(&envelope).expect("readable");
    assert_eq!((claimed, signers.len()), (statement(), 4));
}

#[test]
fn refused_other_signers_and_too_few() {
    let by = |keys: &[&crate::OperatorKey], threshold| {
        let envelope = sign_release(&statement(), keys).expect("signed");
        verify_release(&envelope, &trust(threshold)).expect_err("refused")
    };
    assert!(matches!(by(&[mallory()], 1), VerifyError::UnknownSigner(_)));
    let few = by(&[alice()], 2);
    assert!(matches!(
        few,
        VerifyError::BelowThreshold {
            given: 1,
            needed: 2
        }
    ));
}

#[test]
fn every_changed_byte_is_refused() {
    let envelope = sign_release(&statement(), &[alice()]).expect("signed");
    let trust = trust(1);
    // Its whole payload and headers, and every 64th byte of the signatures.
    let step = |at: usize| if at < 256 { 1 } else { 64 };
    let mut at = 0;
    while at < envelope.len() {
        let mut changed = envelope.clone();
        changed[at] ^= 1 << (at % 8);
        assert!(verify_release(&changed, &trust).is_err(), "byte {at}");
        assert!(
            verify_release(&envelope[..at], &trust).is_err(),
            "cut at {at}"
        );
        at += step(at);
    }
    assert!(verify_release(&envelope, &trust).is_ok());
}

#[test]
fn a_bundle_is_no_release_and_a_release_no_bundle() {
    let trust = trust(1);
    let error = verify_release(&signed(&super::bundle()), &trust).expect_err("a bundle");
    assert!(error.to_string().contains("content type"), "{error}");
    let envelope = sign_release(&statement(), &[alice()]).expect("signed");
    let error = verify(&envelope, &super::policy(&trust)).expect_err("a release");
    assert!(error.to_string().contains("content type"), "{error}");
    // Nor does its signature count under the other header.
    let mut relabelled = Envelope::parse(Kind::Release, &envelope).expect("parsed");
    relabelled.kind = Kind::HostBundle;
    let error = verify(&relabelled.encode(), &super::policy(&trust)).expect_err("relabelled");
    assert!(matches!(error, VerifyError::BadSignature { .. }), "{error}");
}

#[test]
fn refused_statements_that_make_no_sense() {
    let changed = |change: fn(&mut ReleaseStatement)| {
        let mut statement = statement();
        change(&mut statement);
        statement
    };
    let all = [
        changed(|s| "fetch".clone_into(&mut s.component)),
        changed(|s| s.version = 0),
        changed(|s| s.name.clear()),
        changed(|s| s.name = "x".repeat(65)),
        changed(|s| "new\nline".clone_into(&mut s.name)),
    ];
    for statement in all {
        let error = sign_release(&statement, &[alice()]).expect_err("refused");
        assert!(matches!(error, SignError::Release(_)), "{error}");
        // Signed all the same, by another program.
        let error = super::verify_payload_as_release(statement.encode());
        assert!(
            matches!(error, Err(VerifyError::Malformed(_))),
            "{statement:?}"
        );
    }
}

#[test]
fn refused_other_forms_of_the_same_statement() {
    let usual = statement().encode();
    let mut longer = usual.clone();
    longer.push(0);
    // A map with one more key, which nobody knows.
    let mut unknown = usual.clone();
    unknown[0] += 1;
    unknown.extend([4, 0]);
    // The version as a longer number than it needs.
    let at = usual
        .windows(3)
        .position(|w| w == [1, 0x18, 41])
        .expect("it");
    let mut wide = usual[..=at].to_vec();
    wide.extend([0x19, 0, 41]);
    wide.extend(&usual[at + 3..]);
    for payload in [longer, unknown, wide] {
        assert!(super::verify_payload_as_release(payload).is_err());
    }
    assert!(super::verify_payload_as_release(usual).is_ok());
}
