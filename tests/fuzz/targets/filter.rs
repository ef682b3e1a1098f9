//! Filters: what is read has known operators and bounded lists and depth, says the same when it is written again, and what is
//! refused is refused in few words.
#![no_main]

use libfuzzer_sys::fuzz_target;
use relay::model::subscription::filter::{
    Filter, MAX_CONDITIONS, MAX_DEPTH, MAX_ITEMS, MAX_LENGTH, Operator, parse,
};

fuzz_target!(|filter: &str| {
    let filter = match parse(filter) {
        Ok(filter) => filter,
        Err(refused) => return assert!(refused.to_string().len() < 10_000),
    };
    let conditions = filter.conditions();
    assert!(conditions.len() <= MAX_CONDITIONS);
    for condition in conditions {
        assert_eq!(Operator::from_name(condition.operator.name()), Some(condition.operator));
        match condition.operator {
            Operator::In => assert!(condition.values.len() <= MAX_ITEMS),
            _ => assert_eq!(condition.values.len(), 1),
        }
    }
    let Filter::And(terms) = &filter else { panic!("a filter is an and of its terms") };
    let written = terms.iter().map(|term| written(term, "=", 0)).collect::<Vec<_>>().join(",");
    if written.len() <= MAX_LENGTH {
        assert_eq!(parse(&written).as_ref(), Ok(&filter), "{written}");
    }
});

fn written(tree: &Filter, between: &str, depth: usize) -> String {
    assert!(depth <= MAX_DEPTH);
    let quoted = |value: &String| format!("\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\""));
    let (not, tree) = match tree {
        Filter::Not(inner) => ("not.", &**inner),
        tree => ("", tree),
    };
    let group = |name: &str, members: &[Filter]| {
        let members: Vec<String> = members.iter().map(|one| written(one, "", depth + 1)).collect();
        format!("{not}{name}{between}({})", members.join(","))
    };
    match tree {
        Filter::And(members) => group("and", members),
        Filter::Or(members) => group("or", members),
        Filter::Not(_) => panic!("not.not. is not in the grammar"),
        Filter::One(condition) => {
            let values = condition.values.iter().map(quoted).collect::<Vec<_>>().join(",");
            let values = if condition.operator == Operator::In { format!("({values})") } else { values };
            let then = if between.is_empty() { "." } else { between };
            format!("{}{then}{not}{}.{values}", quoted(&condition.column), condition.operator.name())
        }
    }
}
