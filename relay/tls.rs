//! TLS towards servers: which certificates the relay believes.

use std::sync::Arc;

use rustls::ClientConfig;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

/// Nothing can be trusted like this; the text says why.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TlsError(String);

/// A client that trusts the authorities in this PEM file, by default those of the system.
///
/// # Errors
/// When the file holds no certificate.
pub fn trusting(authority: Option<&str>) -> Result<ClientConfig, TlsError> {
    let mut roots = rustls::RootCertStore::empty();
    match authority {
        Some(path) => {
            let unfit =
                |why: &dyn std::fmt::Display| TlsError(format!("certificate authority {path}: {why}"));
            for certificate in CertificateDer::pem_file_iter(path).map_err(|error| unfit(&error))? {
                roots.add(certificate.map_err(|error| unfit(&error))?).map_err(|error| unfit(&error))?;
            }
        }
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| TlsError(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(config)
}
