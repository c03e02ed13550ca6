//! Charts as SVG, light and dark, for docs/. Pure.

use std::fmt::Write as _;

const WIDTH: f64 = 720.0;
const LEFT: f64 = 216.0;
/// Room behind the longest bar for its number.
const RIGHT: f64 = 90.0;
const LINE: f64 = 26.0;
const STYLE: &str = "<style>text{font:13px system-ui,sans-serif;fill:#24292f}.bg{fill:#fff}.axis{stroke:#8b949e;stroke-width:1}\
    @media(prefers-color-scheme:dark){text{fill:#e6edf3}.bg{fill:#0d1117}}</style>";
const COLOURS: [&str; 3] = ["#2f81f7", "#d29922", "#3fb950"];

/// Bars of one measure.
pub struct Bars {
    pub title: String,
    pub values: Vec<(String, f64)>,
}

/// Points of several lines over one x.
pub struct Curve {
    pub title: String,
    pub x: &'static str,
    pub y: &'static str,
    /// Name of a line, and its points.
    pub lines: Vec<(&'static str, Vec<(f64, f64)>)>,
}

/// One group of bars below the other.
pub fn bars(groups: &[Bars]) -> String {
    let (mut y, mut out) = (28.0, String::new());
    for (group, colour) in groups.iter().zip(COLOURS.iter().cycle()) {
        let most = group.values.iter().map(|v| v.1).fold(f64::MIN_POSITIVE, f64::max);
        let _ = writeln!(out, "<text x=\"16\" y=\"{y}\" font-weight=\"600\">{}</text>", escape(&group.title));
        y += 2.0;
        for (label, value) in &group.values {
            y += LINE;
            let length = (value / most * (WIDTH - LEFT - RIGHT)).max(1.0);
            let _ = writeln!(
                out,
                "<text x=\"{}\" y=\"{y}\" text-anchor=\"end\">{}</text><rect x=\"{LEFT}\" y=\"{}\" width=\"{length:.0}\" \
                 height=\"18\" rx=\"2\" fill=\"{colour}\"/><text x=\"{:.0}\" y=\"{y}\">{}</text>",
                LEFT - 10.0,
                escape(label),
                y - 14.0,
                LEFT + length + 6.0,
                thousands(*value)
            );
        }
        y += 46.0;
    }
    let titles: Vec<&str> = groups.iter().map(|g| g.title.as_str()).collect();
    svg(y - 28.0, &titles.join("; "), &out)
}

/// Lines over logarithmic axes, since both rates and latencies span decades.
pub fn curve(curve: &Curve) -> String {
    let (height, left, top, bottom) = (380.0, 70.0, 60.0, 50.0);
    let all = || curve.lines.iter().flat_map(|l| &l.1);
    let decades = |values: Vec<f64>| {
        let low = values.iter().copied().fold(f64::INFINITY, f64::min).max(0.01).log10().floor();
        let high = values.iter().copied().fold(0.01, f64::max).log10().ceil().max(low + 1.0);
        (low, high)
    };
    let (x0, x1) = decades(all().map(|p| p.0).collect());
    let (y0, y1) = decades(all().map(|p| p.1).collect());
    let x = |v: f64| left + (v.log10() - x0) / (x1 - x0) * (WIDTH - left - 40.0);
    let y = |v: f64| height - bottom - (v.log10() - y0) / (y1 - y0) * (height - top - bottom);
    let mut out = String::new();
    let _ = writeln!(out, "<text x=\"16\" y=\"28\" font-weight=\"600\">{}</text>", escape(&curve.title));
    for power in (x0 as i32)..=(x1 as i32) {
        let (v, foot) = (10f64.powi(power), height - bottom);
        let _ = writeln!(
            out,
            "<path class=\"axis\" opacity=\".4\" d=\"M{0:.0} {top}V{foot}\"/><text x=\"{0:.0}\" y=\"{1}\" text-anchor=\"middle\">{2}</text>",
            x(v),
            foot + 18.0,
            thousands(v)
        );
    }
    for power in (y0 as i32)..=(y1 as i32) {
        let v = 10f64.powi(power);
        let _ = writeln!(
            out,
            "<path class=\"axis\" opacity=\".4\" d=\"M{left} {0:.0}H{1}\"/><text x=\"{2}\" y=\"{3:.0}\" text-anchor=\"end\">{4}</text>",
            y(v),
            WIDTH - 40.0,
            left - 8.0,
            y(v) + 4.0,
            thousands(v)
        );
    }
    for ((i, (name, points)), colour) in curve.lines.iter().enumerate().zip(COLOURS) {
        let mut points = points.clone();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let path: Vec<String> = points.iter().map(|p| format!("{:.0},{:.0}", x(p.0), y(p.1))).collect();
        let _ = writeln!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            path.join(" ")
        );
        for p in &points {
            let _ = write!(out, "<circle cx=\"{:.0}\" cy=\"{:.0}\" r=\"4\" fill=\"{colour}\"/>", x(p.0), y(p.1));
        }
        let at = left + 90.0 * i as f64;
        let _ = writeln!(
            out,
            "<rect x=\"{at}\" y=\"38\" width=\"12\" height=\"12\" fill=\"{colour}\"/><text x=\"{}\" y=\"49\">{name}</text>",
            at + 18.0
        );
    }
    let _ = writeln!(
        out,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text><text x=\"{}\" y=\"49\" text-anchor=\"end\">{}</text>",
        WIDTH - 40.0,
        height - 12.0,
        escape(curve.x),
        WIDTH - 40.0,
        escape(curve.y)
    );
    svg(height, &curve.title, &out)
}

fn svg(height: f64, label: &str, body: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" role=\"img\" \
         aria-label=\"{}\">\n{STYLE}\n<rect class=\"bg\" width=\"{WIDTH}\" height=\"{height}\"/>\n{body}</svg>\n",
        escape(label)
    )
}

fn thousands(value: f64) -> String {
    if value < 10.0 {
        return format!("{}", (value * 100.0).round() / 100.0);
    }
    let digits = format!("{value:.0}");
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;")
}
