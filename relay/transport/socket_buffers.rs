//! What the kernel may hold of a connection. The settings of the listening socket are those of all it accepts.

use std::io::Result;
use std::time::Duration;

use socket2::SockRef;
use tokio::net::TcpListener;

/// So much may be in the send buffer without having been sent: enough to keep the line busy until the socket is written
/// to again, and all that a reader that stopped costs there.
const UNSENT: u32 = 64 * 1024;
/// What clients send is small, and read at once.
const RECEIVED: usize = 32 * 1024;

/// Bounds what the kernel holds of each connection. `send` bytes may be on their way, for which the kernel takes twice as
/// much memory at most and no more by itself; a peer from which nothing is heard for `vanished` is gone.
///
/// # Errors
/// When the system refuses.
pub fn bound(listener: &TcpListener, send: usize, vanished: Duration) -> Result<()> {
    let socket = SockRef::from(listener);
    socket.set_send_buffer_size(send)?;
    socket.set_recv_buffer_size(RECEIVED)?;
    #[cfg(target_os = "linux")]
    {
        socket.set_tcp_notsent_lowat(UNSENT)?;
        socket.set_tcp_user_timeout(Some(vanished))?;
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (UNSENT, vanished);
    Ok(())
}
