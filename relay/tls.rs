//! TLS of outgoing connections: which server certificates the relay trusts.

use std::sync::Arc;
use std::time::Duration;

use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};

/// An invalid TLS configuration; the text has the reason.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TlsError(String);

/// Which checks the certificate of a PostgreSQL server must pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verification {
    /// None: the connection is encrypted, to a server that is not verified.
    None,
    /// A trusted authority has signed it (`verify-ca`).
    Authority,
    /// A trusted authority has signed it for the host name (`verify-full`).
    Full,
}

/// How a PostgreSQL server is verified, and the client certificate it gets.
#[derive(Debug, Clone)]
pub struct Trust {
    /// The checks of its certificate.
    pub verification: Verification,
    /// The PEM file with the trusted certificates; by default those of the system.
    pub authority: Option<String>,
    /// The client certificate and its key, PEM files.
    pub identity: Option<(String, String)>,
}

/// Returns a client configuration that trusts the authorities in this PEM file, by default those of the system.
///
/// # Errors
/// When the file holds no certificate.
pub fn trusting(authority: Option<&str>) -> Result<ClientConfig, TlsError> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| TlsError(error.to_string()))?;
    Ok(builder.with_root_certificates(roots(&authorities(authority)?)?).with_no_client_auth())
}

/// Returns what connects to HTTP servers, by TLS where the address says so, within a time limit.
///
/// # Errors
/// When the certificates of the system cannot be used.
pub fn https(connect_timeout: Duration) -> Result<HttpsConnector<HttpConnector>, TlsError> {
    let mut http = HttpConnector::new();
    http.enforce_http(false);
    http.set_connect_timeout(Some(connect_timeout));
    http.set_nodelay(true);
    let https = HttpsConnectorBuilder::new().with_tls_config(trusting(None)?).https_or_http();
    Ok(https.enable_http1().wrap_connector(http))
}

/// The text of an error of a request over such a connector, with its causes: alone it only says that connecting failed.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// Returns a client configuration for a PostgreSQL server.
///
/// # Errors
/// When a file cannot be read, or holds no certificate or key.
pub fn to_postgres(trust: &Trust) -> Result<ClientConfig, TlsError> {
    let trusted = match trust.verification {
        Verification::None => Vec::new(),
        _ => authorities(trust.authority.as_deref())?,
    };
    let pinned = if trust.authority.is_some() { trusted.clone() } else { Vec::new() };
    let provider = provider();
    let verifier = PostgresVerifier {
        verification: trust.verification,
        roots: roots(&trusted)?,
        pinned,
        provider: Arc::clone(&provider),
    };
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| TlsError(error.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match &trust.identity {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain = certificates(certificate).map_err(|why| TlsError(format!("{certificate}: {why}")))?;
            let secret =
                PrivateKeyDer::from_pem_file(key).map_err(|why| TlsError(format!("{key}: {why}")))?;
            builder
                .with_client_auth_cert(chain, secret)
                .map_err(|why| TlsError(format!("{certificate} and {key}: {why}")))?
        }
    };
    // PostgreSQL requires ALPN when TLS starts with the first byte (`sslnegotiation=direct`).
    config.alpn_protocols = vec![b"postgresql".to_vec()];
    Ok(config)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Reads the trusted certificates of a file, or of the system.
fn authorities(path: Option<&str>) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let Some(path) = path else { return Ok(rustls_native_certs::load_native_certs().certs) };
    let unfit = |why: &str| TlsError(format!("certificate authority {path}: {why}"));
    let found = certificates(path).map_err(|why| unfit(&why))?;
    for certificate in &found {
        RootCertStore::empty().add(certificate.clone()).map_err(|why| unfit(&why.to_string()))?;
    }
    Ok(found)
}

fn certificates(path: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<_, _>>)
        .map_err(|why| why.to_string())?;
    if found.is_empty() {
        return Err(String::from("the file contains no certificate"));
    }
    Ok(found)
}

fn roots(trusted: &[CertificateDer<'static>]) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(trusted.iter().cloned());
    Ok(roots)
}

/// Checks a server's certificate as libpq does for the `sslmode`.
#[derive(Debug)]
struct PostgresVerifier {
    verification: Verification,
    roots: RootCertStore,
    /// Certificates of the given file. One of them may be the server's own: the PostgreSQL manual shows how to create such
    /// self-signed certificates.
    pinned: Vec<CertificateDer<'static>>,
    provider: Arc<CryptoProvider>,
}

impl PostgresVerifier {
    fn is_trusted(
        &self,
        shown: &CertificateDer<'_>,
        certificate: &ParsedCertificate<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        let algorithms = self.provider.signature_verification_algorithms.all;
        let signed = verify_server_cert_signed_by_trust_anchor(
            certificate,
            &self.roots,
            intermediates,
            now,
            algorithms,
        );
        match signed {
            // The validity period is checked before the issuer, so only the issuer is exempt here.
            Err(Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::Other(_)))
                if self.pinned.iter().any(|pinned| pinned == shown) =>
            {
                Ok(())
            }
            signed => signed,
        }
    }
}

impl ServerCertVerifier for PostgresVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if self.verification >= Verification::Authority {
            let certificate = ParsedCertificate::try_from(end_entity)?;
            self.is_trusted(end_entity, &certificate, intermediates, now)?;
            if self.verification == Verification::Full {
                verify_server_name(&certificate, server_name)?;
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
