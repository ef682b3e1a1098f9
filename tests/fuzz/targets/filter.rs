//! Filters: what is read has known operators and bounded lists, says the same when it is written again, and what is
//! refused is refused in few words.
#![no_main]

use libfuzzer_sys::fuzz_target;
use relay::model::subscription::filter::{Condition, Operator, parse};

fuzz_target!(|filter: &str| {
    let conditions = match parse(filter) {
        Ok(conditions) => conditions,
        Err(refused) => return assert!(refused.to_string().len() < 10_000),
    };
    assert!(conditions.len() <= 100);
    for condition in &conditions {
        assert_eq!(Operator::from_name(condition.operator.name()), Some(condition.operator));
        match condition.operator {
            Operator::In => assert!(condition.values.len() <= 100),
            _ => assert_eq!(condition.values.len(), 1),
        }
    }
    // A column with signs of the grammar in it has no second spelling.
    let plain = |condition: &&Condition| !condition.column.contains(['"', '(', ')', ',']);
    let plain: Vec<Condition> = conditions.iter().filter(plain).cloned().collect();
    let written = plain.iter().map(written).collect::<Vec<_>>().join(",");
    if written.len() < 60_000 {
        assert_eq!(parse(&written).as_ref(), Ok(&plain), "{written}");
    }
});

fn written(condition: &Condition) -> String {
    let quoted = |value: &String| format!("\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\""));
    let values = condition.values.iter().map(quoted).collect::<Vec<_>>().join(",");
    let values = if condition.operator == Operator::In { format!("({values})") } else { values };
    let not = if condition.negated { "not." } else { "" };
    format!("{}={not}{}.{values}", condition.column, condition.operator.name())
}
