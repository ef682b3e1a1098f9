//! The current rows of a table, or a page of them, with the cursor to continue from.

use hyper::StatusCode;

use crate::feed::deliver::frame::Frame;
use crate::feed::deliver::queue::Taken;
use crate::feed::handle::RowsPage;
use crate::feed::subscribe::RequestError;
use crate::model::session::limits::{ExceededLimit, RowLimit};
use crate::model::subscription::binding::{Scope, Subscription};
use crate::model::subscription::error::raising_on_read;
use crate::transport::app::App;
use crate::transport::changes::refusal::{no_room, notice, unavailable};
use crate::transport::changes::request::ChangesRequest;
use crate::transport::held_answer::{WatchedOutbox, json_answer};
use crate::transport::response::{Answer, error};

/// Rows are collected into blocks of this size, each counted in the memory budget.
const BLOCK: usize = 64 * 1024;

/// Answers with the current rows, or a page of them, and the cursor to continue from.
pub async fn rows(app: &App, call: ChangesRequest, watched: WatchedOutbox) -> Answer {
    let paging = &call.paging;
    let limit = RowLimit {
        number: paging.limit.unwrap_or(app.limits.rows.number),
        bytes: app.limits.rows.bytes.min(app.budget.share()),
    };
    let outbox = call.outbox;
    let mut block = String::new();
    let mut is_first = true;
    // Full blocks wait in the outbox, where they are counted and can be evicted.
    let mut take = |row: &str| {
        if !std::mem::take(&mut is_first) {
            block.push(',');
        }
        block.push_str(row);
        block.len() < BLOCK || outbox.answer(std::mem::take(&mut block))
    };
    match app.feed.rows(&call.subscription, paging, limit, &mut take).await {
        Ok(RowsPage { found, last }) => match found.beyond {
            Some(ExceededLimit::Room) => no_room(),
            Some(exceeded) if exceeded != ExceededLimit::Number || paging.limit.is_none() => {
                error(StatusCode::PAYLOAD_TOO_LARGE, &too_many_rows(limit, exceeded))
            }
            exceeded => {
                let more = exceeded.is_some();
                block.push_str(&format!(r#"],"more":{more}"#));
                if let Some(last) = last.filter(|_| more) {
                    block.push_str(&format!(r#","after":"{}""#, last.encode()));
                }
                block.push_str(&notice(call.subscription.hidden().next()));
                block.push('}');
                if !outbox.answer(block) || outbox.take().await != Taken::Frames {
                    return no_room();
                }
                let head = format!(r#"{{"cursor":"{}","rows":["#, found.cursor);
                outbox.in_flight().frames.push_front(Frame::text(head, &app.budget));
                json_answer(outbox, watched)
            }
        },
        Err(RequestError::Refused(why)) => error(StatusCode::BAD_REQUEST, &why.to_string()),
        Err(RequestError::Failed(why)) => {
            // Log no message of PostgreSQL: an error raised by a policy may contain rows or claims.
            match why.code() {
                Some(code) => tracing::debug!(code, "rows refused by PostgreSQL"),
                None => tracing::debug!(error = %why, "rows not read"),
            }
            match why.refusal() {
                Some(_) if why.code() == Some("42883") && !paging.order.is_empty() => error(
                    StatusCode::BAD_REQUEST,
                    "order: a column that it names has a type without an order",
                ),
                Some(_) if !why.is_transient() => {
                    error(StatusCode::FORBIDDEN, &rows_refused(&call.subscription, why.code()))
                }
                _ => unavailable(),
            }
        }
    }
}

/// The error for rows that PostgreSQL refused. Unless the code means missing rights or a timeout, the policy raised an error.
fn rows_refused(subscription: &Subscription, code: Option<&str>) -> String {
    let binding = subscription.bindings().first();
    match (binding.map(|binding| (&binding.scope, &binding.filter)), code) {
        (Some((Scope::Relation(_, _, name, _), None)), Some(code)) if !matches!(code, "42501" | "57014") => {
            raising_on_read(&name.0, &name.1)
        }
        _ => String::from("the rows may not be read"),
    }
}

fn too_many_rows(limit: RowLimit, exceeded: ExceededLimit) -> String {
    let (what, setting) = match exceeded {
        ExceededLimit::Number => (format!("{} rows", limit.number), "--most-rows"),
        ExceededLimit::Bytes | ExceededLimit::Room => {
            (format!("{} bytes of rows", limit.bytes), "--most-row-bytes or --total-outbox-bytes")
        }
    };
    format!(
        "more than {what}: read them in pages (limit=), narrow them by filter=, or have the relay started with a larger {setting}"
    )
}
