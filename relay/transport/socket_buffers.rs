//! Limits on kernel buffers. Accepted connections inherit the settings of the listening socket.

use std::io::Result;
use std::time::Duration;

use socket2::SockRef;
use tokio::net::TcpListener;

/// Maximum number of unsent bytes in the send buffer: enough to keep the line busy until the next write, and the limit of what
/// a stopped reader costs there.
const MAX_UNSENT: u32 = 64 * 1024;
/// Receive buffer in bytes. Small, because clients send little and it is read at once.
const RECEIVE_BUFFER: usize = 32 * 1024;

/// Limits the kernel buffers of each connection. `send` bytes may be in flight; the kernel uses at most twice that memory and
/// does not grow the buffer. A connection whose peer acknowledges nothing for `vanished` is closed.
///
/// # Errors
/// If the system refuses a socket option.
pub fn bound(listener: &TcpListener, send: usize, vanished: Duration) -> Result<()> {
    let socket = SockRef::from(listener);
    socket.set_send_buffer_size(send)?;
    socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
    #[cfg(target_os = "linux")]
    {
        socket.set_tcp_notsent_lowat(MAX_UNSENT)?;
        socket.set_tcp_user_timeout(Some(vanished))?;
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (MAX_UNSENT, vanished);
    Ok(())
}
