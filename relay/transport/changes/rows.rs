//! The current rows of a table, or a page of them, with the cursor to continue from.

use hyper::StatusCode;
use serde_json::{Map, Value};

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

/// Answers with the current rows of each table, or a page of one, and the cursor to continue from.
pub async fn rows(app: &App, call: ChangesRequest, watched: WatchedOutbox) -> Answer {
    let limit =
        RowLimit { number: app.limits.rows.number, bytes: app.limits.rows.bytes.min(app.budget.share()) };
    let is_ordered = call.pages.iter().any(|paging| !paging.order.is_empty());
    let outbox = call.outbox;
    let mut block = Block { text: String::new(), table: None, names: &call.names };
    // Full blocks wait in the outbox, where they are counted and can be evicted.
    let mut take = |table: usize, row: &str| {
        if !block.begin(table) {
            block.text.push(',');
        }
        block.text.push_str(row);
        block.text.len() < BLOCK || outbox.answer(std::mem::take(&mut block.text))
    };
    match app.feed.rows(&call.subscription, &call.pages, limit, &mut take).await {
        Ok(RowsPage { found, last, keys }) => match found.beyond {
            Some(ExceededLimit::Room) => no_room(),
            Some(exceeded) => error(StatusCode::PAYLOAD_TOO_LARGE, &too_many_rows(limit, exceeded)),
            None => {
                block.end(&keys);
                let mut text = block.text;
                text.push_str(&format!(r#","more":{}"#, found.is_cut));
                if let Some(last) = last.filter(|_| found.is_cut) {
                    text.push_str(&format!(r#","after":"{}""#, last.encode()));
                }
                text.push_str(&notice(call.subscription.hidden().next()));
                text.push('}');
                if !outbox.answer(text) || outbox.take().await != Taken::Frames {
                    return no_room();
                }
                let head = format!(r#"{{"cursor":"{}","#, found.cursor);
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
                Some(_) if why.code() == Some("42883") && is_ordered => error(
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

/// The text of an answer that was not sent yet.
struct Block<'a> {
    text: String,
    /// The table whose rows are written.
    table: Option<usize>,
    /// The names of the tables, if there may be several.
    names: &'a [String],
}

impl Block<'_> {
    /// Writes what comes before the rows of a table. Returns false if they have begun.
    fn begin(&mut self, table: usize) -> bool {
        let has_begun = self.table == Some(table);
        if self.names.is_empty() && !has_begun {
            self.text.push_str(r#""rows":["#);
        }
        // Tables without rows are written, too.
        let next = self.table.map_or(0, |written| written + 1);
        for (number, name) in self.names.iter().enumerate().take(table + 1).skip(next) {
            let before = if number == 0 { r#""tables":{"# } else { "]," };
            self.text.push_str(&format!("{before}{}:[", Value::from(name.as_str())));
        }
        self.table = Some(table);
        !has_begun
    }

    /// Writes what comes after the rows: of several tables also the columns of their keys.
    fn end(&mut self, keys: &[Vec<String>]) {
        self.begin(self.names.len().saturating_sub(1));
        self.text.push(']');
        if !self.names.is_empty() {
            let keys: Map<String, Value> =
                self.names.iter().cloned().zip(keys.iter().map(|key| Value::from(key.as_slice()))).collect();
            self.text.push_str(&format!(r#"}},"keys":{}"#, Value::Object(keys)));
        }
    }
}

/// The error for rows that PostgreSQL refused. Unless the code means missing rights or a timeout, the policy raised an error.
fn rows_refused(subscription: &Subscription, code: Option<&str>) -> String {
    // Which of several tables it was is not known.
    let binding = match subscription.bindings() {
        [binding] => Some(binding),
        _ => None,
    };
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
